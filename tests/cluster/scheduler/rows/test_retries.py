"""Tests of rows without a result: how often their sequence is computed again, and when a worker is suspected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llamaclust.cluster.engine.failures import row_failure
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.scheduler.requests import Failed, GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import NOT_FINITE, RowResult
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.kernels.sampling import Sampler
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.messages import Result
from support.wire.slow_codec import decode_microbatch

SETTINGS = SchedulerSettings("m", 100, context_length=200, kv_blocks=40, max_sequences=6)
PLAIN = GenerationRequest("r", (5, 6, 7), 20)
GRAMMAR = replace(PLAIN, grammar=Grammar("{}"))
NAN = float("nan")


def failures(request: GenerationRequest, text: str, *, suspects_workers: bool) -> tuple[int, list[bool], list[str]]:
    """Returns how often a row fails until its sequence does, whether its chunks were checked, and stage faults."""
    scheduler = Scheduler(SETTINGS, 1, 1)
    scheduler.add(request, 0)
    checked, faults = list[bool](), list[str]()
    for number in range(5):
        scheduled = scheduler.next_microbatch(number)
        assert scheduled is not None
        assert decode_microbatch(encode_microbatch(scheduled.microbatch)) == scheduled.microbatch
        checked.append(scheduled.microbatch.chunks[0].checked)
        result = Result(1, number, (RowResult(-1, NAN, failure=text),))
        completed = scheduler.complete(result, number, suspects_workers=suspects_workers)
        faults += [fault.failure for fault in completed.faults]
        if completed.updated:
            assert completed.updated == [(1, [Failed(text)])]
            assert completed.failed_elsewhere == [1] * len(faults), "only where a worker was suspected before"
            return number + 1, checked, faults
    raise AssertionError("it never ends")


@pytest.mark.parametrize("request_", [PLAIN, GRAMMAR], ids=["plain", "grammar"])
def test_a_row_that_is_not_finite_is_computed_again_checked_and_then_elsewhere(request_: GenerationRequest) -> None:
    text = f"{NOT_FINITE}: damaged weights"
    assert failures(request_, text, suspects_workers=False) == (2, [False, False], [])
    assert failures(request_, text, suspects_workers=True) == (3, [False, True, True], [text])


def test_a_grammar_that_cannot_be_followed_is_no_workers_fault() -> None:
    assert failures(GRAMMAR, "the grammar is too complex", suspects_workers=True) == (2, [False, False], [])
    assert failures(PLAIN, "out of order", suspects_workers=True) == (3, [False, True, True], ["out of order"])


def test_each_sequence_that_a_stage_fails_again_is_evidence() -> None:
    scheduler = Scheduler(SETTINGS, 1, 1)
    scheduler.add(PLAIN, 0)
    scheduler.add(replace(PLAIN, prompt=(8, 9)), 0)
    for sequence in scheduler.sequences:
        sequence.failures = 1
    scheduled = scheduler.next_microbatch(0)
    assert scheduled is not None
    rows = (RowResult(-1, NAN, failure=NOT_FINITE),) * 2
    faults = scheduler.complete(Result(1, 0, rows), 0, suspects_workers=True).faults
    assert row_failure(faults, [StageInfo("a", 0, 1), StageInfo("b", 1, 2)]).requests == {1, 2}


def test_a_result_between_two_failures_begins_anew_without_checks() -> None:
    scheduler = Scheduler(SETTINGS, 1, 1)
    scheduler.add(PLAIN, 0)
    rows = [RowResult(-1, NAN, failure=NOT_FINITE), RowResult(8, -1.0), RowResult(9, -1.0)]
    checked = []
    for number, row in enumerate(rows):
        scheduled = scheduler.next_microbatch(number)
        assert scheduled is not None
        checked.append(scheduled.microbatch.chunks[0].checked)
        assert scheduler.complete(Result(1, number, (row,)), number, suspects_workers=True).faults == []
    assert checked == [False, True, False]


@pytest.mark.parametrize(
    ("request_", "row"),
    [
        (GRAMMAR, RowResult(-1, NAN, failure="the grammar is too complex")),
        (GRAMMAR, RowResult(-1, NAN, failure="no end", is_request_fault=True)),
        (PLAIN, RowResult(-1, NAN, failure=NOT_FINITE, is_request_fault=True)),
    ],
)
def test_a_request_that_fails_by_itself_frees_no_worker_even_after_one_was_suspected(
    request_: GenerationRequest, row: RowResult
) -> None:
    for others in range(3):
        scheduler = Scheduler(SETTINGS, 1, 1)
        scheduler.add(request_, 0)
        rows = [*[RowResult(-1, NAN, failure=NOT_FINITE)] * others, *[row] * 2]
        for number, each in enumerate(rows):
            if scheduler.next_microbatch(number) is None:
                break
            completed = scheduler.complete(Result(1, number, (each,)), number, suspects_workers=True)
            assert not completed.failed_elsewhere
        assert not scheduler.sequences


def test_the_samplers_failure_begins_as_the_scheduler_knows_it() -> None:
    task = SampleTask(SamplingParams(), 0, 0, 3)
    (row,) = Sampler(100).run(np.full((1, 100), np.nan, np.float32), (task,))
    assert row.failure is not None and row.failure.startswith(NOT_FINITE)
