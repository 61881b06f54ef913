"""The thread on which a worker computes: jobs one after the other, answers back on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], bytes]
Done = Callable[[bytes | Exception], None]


class ComputeThread:
    """One thread for all stages of a worker: native calls release the GIL, so the event loop goes on meanwhile."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[tuple[Job, Done] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def submit(self, job: Job, done: Done) -> None:
        """Queues `job`; `done` gets what it returns or raises, on the event loop, in the order of submission."""
        self._jobs.put((job, done))

    async def call(self, job: Callable[[], None]) -> None:
        """Runs `job` after those that are queued; raises what it raises."""
        answered: asyncio.Future[bytes | Exception] = self._loop.create_future()

        def run() -> bytes:
            job()
            return b""

        self.submit(run, lambda answer: None if answered.done() else answered.set_result(answer))
        answer = await answered
        if isinstance(answer, Exception):
            raise answer

    def stop(self, wait_s: float) -> bool:
        """Ends the thread after the jobs that are queued; False where it is still computing after `wait_s`."""
        self._jobs.put(None)
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, done = entry
            try:
                answer: bytes | Exception = job()
            except Exception as error:  # noqa: BLE001  a border between threads: the other side raises it
                answer = error
            try:
                self._loop.call_soon_threadsafe(done, answer)
            except RuntimeError:  # the loop is closed: the process is about to end
                return
