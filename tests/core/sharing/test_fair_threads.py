"""Tests of threads that owners share by CPU time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial

import pytest

from llamaclust.core.sharing import fair_threads
from llamaclust.core.sharing.fair_threads import FairThreads

_WAIT_S = 30.0


class Jobs:
    """Jobs with a given CPU time, which are recorded when they run. A closed gate holds each job before its end."""

    def __init__(self, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._clock = threading.local()
        monkeypatch.setattr(fair_threads, "thread_time_ns", lambda: getattr(self._clock, "ns", 0))
        self.threads = FairThreads(threads, "test")
        self.ran: list[tuple[int, int]] = []  # (owner, size) of each job, in the order in which they began.
        self.gate = threading.Event()

    def add(self, owner: int, size: int = 1, takes_ns: int = 1) -> Future[None]:
        return self.threads.submit(owner, size, partial(self._run, owner, size, takes_ns))

    def _run(self, owner: int, size: int, takes_ns: int) -> None:
        self.ran.append((owner, size))
        assert self.gate.wait(_WAIT_S)
        self._clock.ns = getattr(self._clock, "ns", 0) + takes_ns

    def finish(self, *jobs: Future[None]) -> list[int]:
        self.gate.set()
        for job in jobs:
            job.result(_WAIT_S)
        return [owner for owner, _ in self.ran]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Jobs]]:
    opened: list[Jobs] = []

    def make(threads: int) -> Jobs:
        opened.append(Jobs(threads, monkeypatch))
        return opened[-1]

    yield make
    for jobs in opened:
        jobs.gate.set()
        jobs.threads.close()


def test_an_owner_has_one_running_job_and_another_owner_begins_at_once(made: Callable[[int], Jobs]) -> None:
    jobs = made(2)
    heavy = [jobs.add(1, 1000) for _ in range(31)]
    light = jobs.add(2)
    while len(jobs.ran) < 2:
        threading.Event().wait(0.001)
    assert jobs.ran == [(1, 1000), (2, 1)]
    assert jobs.finish(*heavy, light).count(1) == 31


@pytest.mark.parametrize("takes_ns", [1, 7, 1000])
def test_owners_take_turns_by_cpu_time(made: Callable[[int], Jobs], takes_ns: int) -> None:
    """An owner whose jobs take less time has more of them done in the same time."""
    jobs = made(1)
    first = jobs.add(0)
    rest = [jobs.add(owner, takes_ns=takes_ns * owner) for owner in (1, 2) for _ in range(12)]
    order = jobs.finish(first, *rest)[1:]
    assert order[:12].count(1) == 8 and order[:12].count(2) == 4


def test_among_owners_without_use_the_smallest_job_comes_first(made: Callable[[int], Jobs]) -> None:
    jobs = made(1)
    first = jobs.add(0)
    rest = [jobs.add(owner, size=1000 - owner) for owner in range(1, 32)]
    assert jobs.finish(first, *rest, jobs.add(40, size=5))[:3] == [0, 40, 31]


def test_an_owner_that_comes_late_gets_its_share_and_no_more(made: Callable[[int], Jobs]) -> None:
    """A late owner does not claim the time in which it had no jobs."""
    jobs = made(1)
    jobs.gate.set()
    jobs.finish(*[jobs.add(1, takes_ns=100) for _ in range(3)])
    jobs.gate.clear()
    jobs.ran.clear()
    early = [jobs.add(1, takes_ns=100) for _ in range(8)]
    late = [jobs.add(2, takes_ns=100) for _ in range(8)]
    order = jobs.finish(*early, *late)
    assert all(abs(order[:count].count(1) - order[:count].count(2)) <= 2 for count in range(16)), order


def test_an_error_goes_to_its_job_and_others_run(made: Callable[[int], Jobs]) -> None:
    jobs = made(1)
    failing = jobs.threads.submit(1, 1, lambda: [][0])
    assert jobs.finish(jobs.add(1), jobs.add(2)) == [1, 2]
    with pytest.raises(IndexError):
        failing.result(_WAIT_S)


def test_closing_cancels_jobs_that_have_not_begun(made: Callable[[int], Jobs]) -> None:
    jobs = made(2)
    begun, waiting = jobs.add(1), [jobs.add(1) for _ in range(3)]
    while not jobs.ran:
        threading.Event().wait(0.001)
    jobs.threads.close()
    assert all(job.cancelled() for job in waiting)
    assert jobs.finish(begun) == [1]
