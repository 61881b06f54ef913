"""Tests when deferred rows of a last stage break the protocol."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.wire.microbatch.messages import Result
from llamaclust.worker.stage.matched_answer import _READY_S, DEFERRED
from support.plans.drafting import SaidDrafters

SETTINGS = SchedulerSettings("m", 100, context_length=200, kv_blocks=40, max_sequences=6)
PLAIN = GenerationRequest("r", (5, 6, 7), 20)
S_NS = 1_000_000_000


def deferring(request: GenerationRequest, times_s: list[float], settings: SchedulerSettings = SETTINGS) -> Scheduler:
    """Returns a scheduler after results at these times, each of which deferred the first row."""
    scheduler = Scheduler(settings, 1, 1)
    scheduler.add(request, 0)
    for number, at_s in enumerate(times_s):
        assert scheduler.next_microbatch(int(at_s * S_NS)) is not None
        scheduler.complete(Result(1, number, (DEFERRED,)), int(at_s * S_NS))
    return scheduler


@pytest.mark.parametrize(
    "request_",
    [
        PLAIN,
        replace(PLAIN, params=SamplingParams(temperature=0.8, repetition_penalty=1.2)),
        replace(PLAIN, score_from=1),
    ],
    ids=["greedy", "sampled with penalties", "scored"],
)
def test_a_deferred_row_without_a_matcher_breaks_the_protocol(request_: GenerationRequest) -> None:
    scheduler = Scheduler(SETTINGS, 1, 1)
    scheduler.add(request_, 0)
    scheduled = scheduler.next_microbatch(0)
    assert scheduled is not None
    rows = (DEFERRED,) * len(scheduled.inputs.tasks)
    with pytest.raises(ProtocolError, match="a deferred row that has no matcher"):
        scheduler.complete(Result(1, 0, rows), 1)


def test_a_row_is_deferred_for_longer_than_a_stage_makes_its_matcher_and_not_for_ever() -> None:
    request = replace(PLAIN, grammar=Grammar("{}"))
    scheduler = deferring(request, [0.0, 1.0, _READY_S, 89.0])
    assert scheduler.next_microbatch(91 * S_NS) is not None
    with pytest.raises(ProtocolError, match="microbatch 4 deferred a row again after 90 s"):
        scheduler.complete(Result(1, 4, (DEFERRED,)), 91 * S_NS)


@pytest.mark.parametrize(
    "beside", [{"has_states": True, "state_blocks": 40}, {"window": 20, "window_blocks": 10}], ids=["states", "window"]
)
def test_a_row_whose_prompt_is_computed_again_is_not_deferred_for_ever(beside: dict[str, Any]) -> None:
    """The chunks of the prompt before the row do not begin the time anew."""
    settings = replace(SETTINGS, prefill_chunk=20, max_batch_tokens=32, prefix_cache=False, **beside)
    scheduler = Scheduler(settings, 1, 1)
    scheduler.add(replace(PLAIN, prompt=tuple(range(50)), grammar=Grammar("{}")), 0)
    with pytest.raises(ProtocolError, match="deferred a row again after 90 s"):
        for number in range(30):
            scheduled = scheduler.next_microbatch(10 * number * S_NS)
            assert scheduled is not None
            rows = (DEFERRED,) * len(scheduled.inputs.tasks)
            scheduler.complete(Result(1, number, rows), 10 * number * S_NS)
    assert scheduler.counts.computed_tokens > 2 * 50


def test_matchers_of_waiting_answers_leave_room_for_others() -> None:
    """The deferred row of a model with states is computed again from a checkpoint, so its answer waits meanwhile."""
    scheduler = Scheduler(replace(SETTINGS, max_sequences=2, has_states=True, state_blocks=40), 1, 1)
    held: set[int] = set()

    def run(deferred: frozenset[int] = frozenset()) -> set[int]:
        scheduled = scheduler.next_microbatch(1)
        assert scheduled is not None
        held.difference_update(scheduled.inputs.released)
        held.update(start.key for start in scheduled.inputs.starts)
        keys = [one.sequence.key for one in scheduler.in_flight.slices()]
        rows = tuple(DEFERRED if key in deferred else RowResult(8, -1.0) for key in keys)
        scheduler.complete(Result(1, scheduled.inputs.number, rows), 1)
        return held

    request = replace(PLAIN, grammar=Grammar("{}"))
    scheduler.add(replace(request, owner="a"), 0)
    assert run() == {1}
    scheduler.add(replace(request, owner="a"), 0)
    assert run(frozenset({2})) == {1, 2}
    scheduler.add(replace(request, owner="b", max_new_tokens=3), 0)
    assert [run() for _ in range(3)] == [{1, 3}] * 3
    assert run() == {1, 2}


def test_a_waiting_answer_that_moves_to_another_pipeline_releases_its_matcher() -> None:
    settings = replace(SETTINGS, has_states=True, state_blocks=40)
    scheduler = deferring(replace(PLAIN, grammar=Grammar("{}")), [0.0], settings)
    (sequence,) = scheduler.movable
    scheduler.successor(settings, 2, 1).take_over(scheduler, [sequence])
    assert scheduler.queues.take_released() == (sequence.key,) and not scheduler.sequences


def test_a_result_begins_the_time_anew() -> None:
    scheduler = deferring(replace(PLAIN, grammar=Grammar("{}")), [0.0, 60.0])
    for number, at_s, row in ((2, 70, RowResult(8, -1.0)), (3, 120, DEFERRED), (4, 200, DEFERRED)):
        assert scheduler.next_microbatch(at_s * S_NS) is not None
        scheduler.complete(Result(1, number, (row,)), at_s * S_NS)


def test_a_matcher_that_is_made_anew_begins_the_time_anew() -> None:
    scheduler = deferring(replace(PLAIN, grammar=Grammar("{}")), [0.0, 60.0])
    (sequence,) = scheduler.queues.running
    assert scheduler.next_microbatch(70 * S_NS) is not None
    scheduler.queues.preempt(sequence)
    for number, at_s in ((2, 80), (3, 160), (4, 240)):  # The first result is of the row before.
        scheduler.complete(Result(1, number, (DEFERRED,)), at_s * S_NS)
        assert scheduler.next_microbatch(at_s * S_NS) is not None


def test_drafted_rows_that_are_deferred_break_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row before the drafted ones gets a token each time."""
    monkeypatch.setattr(speculation, "best_windows", lambda candidates, *_: [len(one.tokens) for one in candidates])
    settings = replace(SETTINGS, speculation=SpeculationSettings(SaidDrafters(lambda tokens, most: ())))
    scheduler = deferring(replace(PLAIN, grammar=Grammar("{}")), [], settings)
    drafted = 0
    for number, at_s in enumerate(range(0, 300, 60)):
        scheduled = scheduler.next_microbatch(at_s * S_NS)
        assert scheduled is not None
        drafted += len(scheduled.inputs.tasks) - 1
        rows = (RowResult(8, -1.0, forced_draft=(9, 9)), *[DEFERRED] * (len(scheduled.inputs.tasks) - 1))
        scheduler.complete(Result(1, number, rows), at_s * S_NS)
    assert drafted > 4
