"""Tests which stage owes an overdue result, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llamaclust.cluster.control.failures.overdue import OverdueResults, PendingResult, delaying_stage
from llamaclust.wire.control.messages import StageProgress


def progress(*received: int | None, awaits_tokens: bool = False) -> list[StageProgress | None]:
    """Builds progress in which each stage has sent what the next known stage has received."""
    stages = [
        None if count is None else StageProgress(1, count, next((sent for sent in received[place + 1 :] if sent), 0))
        for place, count in enumerate(received)
    ]
    first, *others = stages
    return [first if first is None else replace(first, awaits_tokens=awaits_tokens), *others]


@pytest.mark.parametrize(
    ("received", "stage"),
    [
        ((7, 7, 7), 0),  # the first stage does not read it
        ((8, 7, 7), 0),
        ((9, 8, 7), 1),
        ((9, 9, 8), 2),
        ((8,), 0),
        ((9, None, 7), 0),  # no heartbeat of the middle stage has this epoch yet
        ((9, None, 8), 2),
    ],
)
def test_the_last_stage_that_has_a_microbatch_owes_it_until_it_sends_it(
    received: tuple[int | None, ...], stage: int
) -> None:
    assert delaying_stage(7, progress(*received)) == stage


@pytest.mark.parametrize(
    ("received", "sent", "stage"),
    [
        ((8, 7, 7), (7, 7, 7), 0),  # the first stage sends nothing
        ((8, 7, 7), (8, 7, 7), 1),  # the middle stage reads nothing
        ((9, 8, 7), (9, 8, 7), 2),  # the last stage reads nothing
        ((9, 8, 7), (9, 7, 7), 1),
        ((9, 9, 8), (9, 9, 8), 2),  # the result is on its way to the coordinator, or lost
        ((9, None, 7), (8, None, 7), 1),
        ((8,), (8,), 0),
    ],
)
def test_a_stage_owes_a_microbatch_that_was_sent_to_it(
    received: tuple[int | None, ...], sent: tuple[int | None, ...], stage: int
) -> None:
    stages = [
        None if count is None or handed is None else StageProgress(1, count, handed)
        for count, handed in zip(received, sent, strict=True)
    ]
    assert delaying_stage(7, stages) == stage


@pytest.mark.parametrize(
    ("received", "sent", "stage"),
    [
        ((8, 9, 7), (7, 9, 7), 0),  # the middle stage claims a microbatch that the first one still has
        ((8, 7, 9), (7, 7, 9), 0),  # the last stage has received nothing
        ((8, 1 << 60, 7, 7), (7, 1 << 60, 7, 7), 0),
        ((8, 8, 7, 9, 7), (8, 7, 7, 9, 7), 1),  # the fourth stage claims it, and accuses the fifth
        ((7, 9, 9), (9, 9, 9), 0),  # the first stage has not read it
        ((9, None, 7, 9), (7, None, 7, 9), 0),
    ],
)
def test_a_stage_claims_no_microbatch_that_was_not_sent_to_it(
    received: tuple[int | None, ...], sent: tuple[int | None, ...], stage: int
) -> None:
    test_a_stage_owes_a_microbatch_that_was_sent_to_it(received, sent, stage)


def test_a_first_stage_that_waits_for_sampled_tokens_waits_for_the_last_one() -> None:
    assert delaying_stage(7, progress(8, 7, 7, awaits_tokens=True)) == 2
    assert delaying_stage(7, progress(8, 8, 7, awaits_tokens=True)) == 1, "the next microbatch waits, this one went on"


def test_only_the_same_microbatch_at_the_same_stage_is_waited_for() -> None:
    overdue = OverdueResults()
    waits = [overdue.waited_s(PendingResult(1, 7, 1), now_s) for now_s in (10.0, 11.0, 11.5)]
    assert waits == [0.0, 1.0, 1.5]
    assert overdue.waited_s(PendingResult(2, 7, 1), 11.5) == 0.0, "another epoch"
    assert overdue.waited_s(PendingResult(1, 7, 1), 12.0) == 2.0
    assert overdue.waited_s(PendingResult(1, 7, 2), 12.5) == 0.0, "it went on"
    assert overdue.waited_s(PendingResult(1, 8, 2), 13.0) == 0.0
    overdue.keep([2])
    assert overdue.waited_s(PendingResult(1, 8, 2), 14.0) == 0.0


def test_a_coordinator_that_was_stopped_accuses_no_worker() -> None:
    overdue = OverdueResults()
    overdue.waited_s(PendingResult(1, 7, 1), 10.0)
    assert overdue.waited_s(PendingResult(1, 7, 1), 70.0) == 1.0
