"""Tests of comparisons with undisturbed answers, and of pauses after faults."""

from __future__ import annotations

import numpy as np
import pytest

from llamaclust.core.sampler.results import RowResult
from llamaclust.tools.chaos.received import Received, answer_rows
from llamaclust.tools.chaos.schedule import FaultKind
from llamaclust.tools.chaos.tally import Comparison, Pauses, Tally

ROWS = [RowResult(token, logprob) for token, logprob in ((5, -0.25), (9, -1.5), (5, -3.0))]
EXPECTED = answer_rows(ROWS)


def compared(rows: list[RowResult]) -> tuple[int, int]:
    comparison = Comparison()
    comparison.add(EXPECTED, answer_rows(rows))
    assert (comparison.answers, comparison.tokens) == (1, len(rows))
    assert comparison.is_intact == (comparison.lost == comparison.changed == 0)
    return comparison.lost, comparison.changed


def test_equal_answers_are_intact() -> None:
    assert compared(ROWS) == (0, 0)


@pytest.mark.parametrize("place", range(3))
def test_one_id_and_one_logprob_bit_are_changes(place: int) -> None:
    row = ROWS[place]
    next_float = float(np.nextafter(np.float32(row.logprob), np.float32(0)))
    for other in (RowResult(row.token + 1, row.logprob), RowResult(row.token, next_float)):
        assert compared([*ROWS[:place], other, *ROWS[place + 1 :]]) == (0, 1)


def test_missing_tokens_are_lost_and_more_are_changes() -> None:
    assert compared(ROWS[:1]) == (2, 0)
    assert compared([]) == (3, 0)
    assert compared([*ROWS, ROWS[0]]) == (0, 1)
    assert compared(ROWS[1:]) == (1, 2)  # a skipped event


def test_each_choice_and_its_events_are_compared() -> None:
    comparison = Comparison()
    received = Received({0: EXPECTED, 1: EXPECTED[:1]})
    comparison.add_request(Received({0: EXPECTED, 1: EXPECTED}), received)
    assert (comparison.answers, comparison.lost, comparison.changed) == (2, 2, 0)
    comparison = Comparison()
    comparison.add_request(Received({0: EXPECTED}), Received({0: EXPECTED}, misplaced=1))
    assert not comparison.is_intact and str(comparison).endswith("; 1 event duplicated or skipped")


def test_a_pause_is_the_longest_gap_until_the_next_fault() -> None:
    pauses = Pauses()
    pauses.token(1.0)
    pauses.token(9.0)  # precedes all faults
    pauses.fault(FaultKind.KILL, 10.0)
    for now_s in (10.01, 10.02, 11.52, 11.6):  # the first two tokens were already in flight
        pauses.token(now_s)
    pauses.fault(FaultKind.STOP, 12.0)
    pauses.fault(FaultKind.KILL, 13.0)
    pauses.token(15.0)
    pauses.token(50.0)
    pauses.token(90.0)  # later than 30 s, so not caused by the fault
    found = pauses.by_kind()
    assert found[FaultKind.KILL] == pytest.approx([1.5, 35.0]) and found[FaultKind.STOP] == pytest.approx([3.0])


def test_the_verdict_names_what_was_wrong() -> None:
    tally = Tally(7)
    tally.faults[FaultKind.DRAIN] += 2
    tally.compared.add(EXPECTED, EXPECTED)
    assert list(tally.verdict()) == [
        "nothing lost, nothing changed: 2 faults, seed 7",
        "1 answer, 3 tokens: 0 lost, 0 changed",
        "drain of a worker: 2",
    ]
    tally.compared.add(EXPECTED, EXPECTED[:2])
    tally.errors["worker a is lost"] += 1
    first, second, *_, last = tally.verdict()
    assert first == "LOST OR CHANGED: 2 faults, seed 7" and second == "2 answers, 5 tokens: 1 lost, 0 changed"
    assert last == "1 answer ended with: worker a is lost"


@pytest.mark.parametrize(("faults", "answers"), [(0, 0), (0, 2), (2, 0)])
def test_a_run_without_faults_or_answers_is_no_success(faults: int, answers: int) -> None:
    tally = Tally(7)
    tally.faults[FaultKind.DRAIN] += faults
    for _ in range(answers):
        tally.compared.add(EXPECTED, EXPECTED)
    assert not tally.is_success
    assert next(tally.verdict()) == f"NOTHING TESTED; give more --minutes: {faults} faults, seed 7"
