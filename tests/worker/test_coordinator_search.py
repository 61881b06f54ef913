"""Tests that a worker finds its coordinator at one of several addresses, regardless of the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from llamaclust.core.errors import LlamaclustError, RefusedError, UsageError, WorkerError
from llamaclust.worker import coordinator_search
from llamaclust.worker.coordinator_search import CoordinatorSearch, Place
from support.clusters.served import until

Outcome = LlamaclustError | str | None
"""The outcome of an attempt: an error, a result, or None if it does not end."""


class Attempts:
    """Attempts at addresses with scripted outcomes; the last outcome repeats."""

    def __init__(self, **outcomes: list[Outcome]) -> None:
        self.made: list[str] = []
        self.cancelled: list[str] = []
        self._outcomes = outcomes

    async def __call__(self, address: str) -> str:
        self.made.append(address)
        outcomes = self._outcomes[address]
        match outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]:
            case None:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.append(address)
                raise AssertionError
            case str(result):
                return result
            case error:
                raise error


GONE = WorkerError("it cannot be reached")


async def test_an_address_that_does_not_answer_delays_no_other_one() -> None:
    search, attempts = CoordinatorSearch(("dead", "gone", "b")), Attempts(dead=[None], gone=[GONE], b=["here"])
    async with asyncio.timeout(60):
        place, result = await search.reached(attempts)
    assert (place.address, result, attempts.made[0]) == ("b", "here", "dead")
    await asyncio.sleep(0)
    assert attempts.cancelled == ["dead"]


async def test_a_search_without_any_address_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(coordinator_search, "_LOG_EVERY_S", 0.01)
    caplog.set_level(logging.INFO)
    search = CoordinatorSearch((), discovers=True)
    searching = asyncio.create_task(search.reached(Attempts(a=["here"])))
    await until(lambda: caplog.text.count("is announced yet") > 1)
    search.add("a")
    assert (await searching)[1] == "here"


async def test_an_address_that_answers_at_once_is_the_only_one_that_is_tried() -> None:
    search, attempts = CoordinatorSearch(("a", "b")), Attempts(a=["here"], b=["there"])
    assert (await search.reached(attempts))[1] == "here"
    assert attempts.made == ["a"]


async def test_each_address_is_tried_again_with_its_own_backoff() -> None:
    search, attempts = CoordinatorSearch(("dead", "b")), Attempts(dead=[None], b=[GONE, GONE, GONE, "here"])
    async with asyncio.timeout(60):
        place, _ = await search.reached(attempts)
    assert attempts.made == ["dead", "b", "b", "b", "b"] and place.failures == 3


async def test_an_address_whose_coordinator_does_not_admit_the_worker_comes_last() -> None:
    search, attempts = CoordinatorSearch(("a", "b")), Attempts(a=["hangs"], b=["here"])
    place, _ = await search.reached(attempts)
    search.failed(place, WorkerError("joining took longer than 10 s"))
    assert (await search.reached(attempts))[0].address == "b"


@pytest.mark.parametrize(
    "outcomes",
    [
        lambda: {"a": [UsageError("no TLS")], "b": [UsageError("another token")]},
        lambda: {"a": [None], "b": [RefusedError("no worker of that name")]},
        lambda: {"a": [RefusedError("no worker of that name")], "b": [GONE]},
    ],
)
async def test_a_worker_that_no_coordinator_takes_ends(outcomes: Callable[[], dict[str, list[Outcome]]]) -> None:
    search, attempts = CoordinatorSearch(("a", "b")), Attempts(**outcomes())
    async with asyncio.timeout(60):
        with pytest.raises(UsageError):
            await search.reached(attempts)


async def test_a_program_at_one_of_several_addresses_ends_nothing() -> None:
    search, attempts = CoordinatorSearch(("a", "b")), Attempts(a=[UsageError("no TLS")], b=[GONE, "here"])
    async with asyncio.timeout(60):
        assert (await search.reached(attempts))[1] == "here"


async def test_a_lost_coordinator_is_waited_for_so_long_as_it_said(caplog: pytest.LogCaptureFixture) -> None:
    search, attempts = CoordinatorSearch(("a", "b")), Attempts(a=["here", RefusedError("not yet")], b=[GONE])
    place, _ = await search.reached(attempts)
    search.admitted("a", 0.5)
    with caplog.at_level(logging.WARNING):
        search.failed(place, WorkerError("its stream ended"))
        async with asyncio.timeout(60):
            with pytest.raises(WorkerError, match=r"gone, and has not come back within 0\.5 s: "):
                await search.reached(attempts)
    assert (
        "waiting for the coordinator at a or b (for 0.5 s at most, with weights kept): its stream ended"
        in caplog.messages
    )


@pytest.mark.parametrize(("outcome", "reason"), [(GONE, "it cannot be reached"), (None, "no address answered")])
async def test_a_first_coordinator_is_waited_for_so_long_as_the_worker_was_told(outcome: Outcome, reason: str) -> None:
    search = CoordinatorSearch(("a",), first_s=0.5)
    said = rf"no coordinator has accepted this worker within 0\.5 s: {reason}"
    async with asyncio.timeout(60):
        with pytest.raises(WorkerError, match=said):
            await search.reached(Attempts(a=[outcome]))


async def test_a_coordinator_that_accepts_no_worker_is_tried_within_the_same_time() -> None:
    search, attempts, tries = CoordinatorSearch(("a",), first_s=0.5), Attempts(a=["here"]), 0
    async with asyncio.timeout(60):
        with pytest.raises(WorkerError, match="no coordinator has accepted this worker within"):
            while True:
                place, _ = await search.reached(attempts)
                search.failed(place, WorkerError("its stream ended"))
                tries += 1
    assert tries > 0


async def test_after_an_admission_the_coordinator_s_time_counts() -> None:
    search = CoordinatorSearch(("a",), first_s=0.0)
    search.admitted("a", 60.0)
    assert (await search.reached(Attempts(a=[GONE, "here"])))[1] == "here"


async def test_failures_before_an_admission_do_not_count_after_it() -> None:
    search, attempts = CoordinatorSearch(("a",)), Attempts(a=[GONE, "here"])
    place, _ = await search.reached(attempts)
    search.admitted("a", 60.0)
    assert place.failures == 0
    search.failed(place, WorkerError("its stream ended"))
    assert (await search.reached(attempts))[1] == "here"


async def test_an_address_that_is_found_later_is_tried_beside_those_that_do_not_answer() -> None:
    search, attempts = CoordinatorSearch(("dead",), discovers=True), Attempts(dead=[None], b=["here"])
    searching = asyncio.create_task(search.reached(attempts))
    await until(lambda: bool(attempts.made))
    search.add("b")
    async with asyncio.timeout(60):
        place, _ = await searching
    assert (place.address, attempts.cancelled) == ("b", ["dead"])


async def test_without_any_address_the_first_found_is_taken() -> None:
    search, attempts = CoordinatorSearch((), discovers=True), Attempts(b=["here"])
    searching = asyncio.create_task(search.reached(attempts))
    await asyncio.sleep(0)
    search.add("b")
    async with asyncio.timeout(60):
        assert (await searching)[1] == "here"


async def test_false_announcements_do_not_end_a_worker() -> None:
    """Fake addresses reject the worker, which would be a final error for configured addresses."""
    wrong = UsageError("does not belong to the token's cluster")
    fakes = {f"fake{index}": [wrong] for index in range(200)}
    search = CoordinatorSearch((), discovers=True)
    attempts = Attempts(real=["here"], **fakes)  # type: ignore[arg-type]
    searching = asyncio.create_task(search.reached(attempts))
    for fake in [*fakes][:20]:
        search.add(fake)
        search.add(fake)
    async with asyncio.timeout(60):
        await until(lambda: len(attempts.made) >= 4)
        search.add("real")
        assert (await searching)[1] == "here"
    for fake in fakes:
        search.add(fake)
    search.failed(Place("fake0"), wrong)
    assert len(search._places) < 100
    with pytest.raises(RefusedError):
        search.failed(Place("real"), RefusedError("no such worker"))


async def test_a_flood_of_false_announcements_hides_the_true_one_until_they_have_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinator_search, "_STAGGER_S", 0.0)
    fakes = {f"fake{index}": [None] for index in range(coordinator_search._MOST_FOUND)}
    search = CoordinatorSearch(("given",), discovers=True)
    attempts = Attempts(given=[None], first=["here"], again=["here"], **fakes)  # type: ignore[arg-type]
    searching = asyncio.create_task(search.reached(attempts))
    for fake in fakes:
        search.add(fake)
    await until(lambda: len(attempts.made) == 1 + len(fakes))
    search.add("first")  # addresses that have not failed keep their places
    false = next(place for place in search._places if place.address == "fake7")
    for _ in range(3):
        search.failed(false, GONE)
        assert "first" not in attempts.made
    search.add("again")
    search.add("fake7")
    async with asyncio.timeout(60):
        assert (await searching)[0].address == "again"
    assert attempts.cancelled[0] == "fake7" and "first" not in attempts.made
    assert len(search._places) == 1 + len(fakes)


async def test_a_coordinator_that_was_found_is_waited_for_each_time_that_it_is_lost() -> None:
    """Multicast DNS does not report a coordinator that returns at the same address."""
    search, attempts = CoordinatorSearch((), discovers=True), Attempts(real=["here", GONE, "here", GONE, "here"])
    search.add("real")
    for _ in range(3):
        async with asyncio.timeout(60):
            place, _ = await search.reached(attempts)
        assert place.address == "real"
        search.admitted("real", 60.0)
        search.failed(place, GONE)
