"""Tests of short jobs whose answers are held and sent together."""

from __future__ import annotations

import asyncio
import threading
import weakref
from functools import partial
from math import inf

import pytest

from llamaclust.worker.stage.compute import Compute


@pytest.mark.parametrize(("hold_ns", "is_held"), [(10**12, True), (0, False)])
async def test_answers_of_short_jobs_come_together(
    monkeypatch: pytest.MonkeyPatch, hold_ns: int, is_held: bool
) -> None:
    """An answer is sent at once if a long job or no job follows."""
    monkeypatch.setattr("llamaclust.worker.stage.compute._HOLD_NS", hold_ns)
    compute, may_begin = Compute(), threading.Event()
    begun, go_on = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    def job(number: int) -> int:
        begun[number].set()
        go_on[number].wait(10)
        return number

    first = compute.queue(lambda: may_begin.wait(10), expected_ns=1)
    answers = [compute.queue(partial(job, number), expected_ns=expected) for number, expected in enumerate((1, 1, inf))]
    may_begin.set()
    await asyncio.to_thread(begun[0].wait, 10)
    assert first.done() is not is_held
    go_on[0].set()
    await asyncio.to_thread(begun[1].wait, 10)
    assert answers[0].done() is not is_held
    go_on[1].set()
    await asyncio.to_thread(begun[2].wait, 10)
    assert first.done() and answers[0].done() and answers[1].done() and not answers[2].done()
    go_on[2].set()
    assert [await answer for answer in answers] == [0, 1, 2]
    compute.close()


async def test_a_held_answer_comes_before_the_thread_waits_for_a_job() -> None:
    compute = Compute()
    async with asyncio.timeout(60):
        assert await compute.queue(lambda: 1, expected_ns=1) == 1
    compute.close()


async def test_a_thread_that_waits_for_a_job_does_not_keep_the_last_one() -> None:
    def job() -> None:
        """Is kept by whoever runs it."""

    compute, kept = Compute(), weakref.ref(job)
    await compute.run(job)
    del job
    assert kept() is None
    compute.close()
