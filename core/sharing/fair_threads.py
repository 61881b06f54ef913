"""Threads that owners share by the CPU time of their jobs. An owner with much work delays only its own work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from time import thread_time_ns


@dataclass(eq=False, slots=True)
class _Job:
    owner: int
    size: int
    run: Callable[[], object]
    done: Future[None] = field(default_factory=Future)


class FairThreads:
    """Runs jobs, at most one of each owner at a time. The next job belongs to the owner whose jobs have used the least
    CPU time. Among such owners, the smallest job comes first. Thread-safe."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._lock = Lock()  # Protects all of the following.
        self._waiting: list[_Job] = []
        self._running: set[int] = set()  # Owners with a running job.
        # CPU time of each owner's jobs. An owner that comes later begins with the time of the owner served last.
        self._used_ns = Counter[int]()
        self._served_ns = 0

    def submit(self, owner: int, size: int, run: Callable[[], object]) -> Future[None]:
        """Queues a job. `size` is any estimate of its work."""
        job = _Job(owner, size, run)
        with self._lock:
            self._used_ns[owner] = max(self._used_ns[owner], self._served_ns)
            self._waiting.append(job)
            self._pool.submit(self._run_all)
        return job.done

    def close(self) -> None:
        """Cancels all jobs that have not begun. Must be the last call."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._pool.shutdown(wait=False, cancel_futures=True)
        for job in waiting:
            job.done.cancel()

    def _run_all(self) -> None:
        """Runs jobs until each waiting job belongs to an owner with a running job."""
        while (job := self._next()) is not None:
            began_ns = thread_time_ns()
            try:
                if job.done.set_running_or_notify_cancel():
                    job.run()
                    job.done.set_result(None)
            except Exception as error:  # noqa: BLE001  raised by the job's future
                job.done.set_exception(error)
            finally:
                self._end(job, thread_time_ns() - began_ns)

    def _next(self) -> _Job | None:
        with self._lock:
            able = [job for job in self._waiting if job.owner not in self._running]
            job = min(able, key=lambda each: (self._used_ns[each.owner], each.size), default=None)
            if job is not None:
                self._waiting.remove(job)
                self._running.add(job.owner)
                self._served_ns = max(self._served_ns, self._used_ns[job.owner])
            return job

    def _end(self, job: _Job, used_ns: int) -> None:
        with self._lock:
            self._running.remove(job.owner)
            self._used_ns[job.owner] += used_ns
            self._forget()

    def _forget(self) -> None:
        """Drops the times of owners that have no jobs, where `submit` would begin with at least the same time."""
        busy = {*self._running, *(job.owner for job in self._waiting)}
        if not busy:
            self._served_ns = 0
        for owner in self._used_ns.keys() - busy:
            if not busy or self._used_ns[owner] <= self._served_ns:
                del self._used_ns[owner]
