"""Tests of slow matchers at the last stage: other answers continue, owners take turns, and no token changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from llamaclust.cluster.scheduler.matcher_turns import _LEAST_NS, _MOST_NS
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.sampler.bounds import MAX_MATCHER_NS
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.wire.microbatch.messages import Microbatch, SamplingInputs
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, expected

CONTEXT, BLOCKS = 400, 4000
MS = 1_000_000
STEP_NS = 2 * MS
"""Time of a step in each stage, without matchers."""
Cost = Callable[[int, int], int]
"""Function of an answer's key and number of earlier tokens that returns the nanoseconds of a matcher's row."""


@dataclass
class SlowMatchers(FakeModel):
    """A model whose rows with a grammar take as long as `cost` says, one after the other."""

    cost: Cost = lambda key, position: 0
    last_ns: int = 0  # of a microbatch
    turns: list[int] = field(default_factory=list)  # keys in the order of their rows

    def begin(self, scheduled: ScheduledMicrobatch) -> None:
        """Records the costs of a microbatch before it is sent."""
        tasks = scheduled.inputs.tasks
        rows = [task.matcher for task in tasks if isinstance(task, SampleTask) and task.matcher is not None]
        self.last_ns = sum(self.cost(row.key, row.position) for row in rows)
        self.turns += [row.key for row in rows if self.cost(row.key, row.position)]

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        rows, tasks = super().run(microbatch, inputs), inputs.tasks
        return tuple(map(self._with_time, tasks, rows))

    def _with_time(self, task: object, row: RowResult) -> RowResult:
        if not isinstance(task, SampleTask) or task.matcher is None:
            return row
        return replace(row, matcher_ns=self.cost(task.matcher.key, task.matcher.position))


def simulation(
    cost: Cost, stages: int = 2, kind: type[SlowMatchers] = SlowMatchers, **fields: Any
) -> tuple[Simulation, SlowMatchers]:
    model = kind(BLOCKS, cost=cost)
    times = [lambda rows: float(STEP_NS)] * (stages - 1) + [lambda rows: float(STEP_NS + model.last_ns)]
    settings = SchedulerSettings("m", VOCABULARY, CONTEXT, BLOCKS, max_sequences=32, **fields)
    run = Simulation(Scheduler(settings, 1, stages), FakeStages(model, times, 100_000))
    run.check = model.begin
    return run, model


def request(number: int, owner: str, tokens: int, group: str = "", *, grammar: bool = True) -> GenerationRequest:
    prompt = tuple((number * 7 + place) % VOCABULARY for place in range(20))
    made = Grammar('{"grammars": []}') if grammar else None
    name = f"{owner}-{group}-{number}"
    return GenerationRequest(name, prompt, tokens, seed=number, group=group, owner=owner, grammar=made)


def until_known(run: Simulation, keys: Iterable[int], tokens: int = 2) -> None:
    """Runs until each key has at least `tokens` tokens: the first ones come together, because no cost is known yet."""
    while any(len(run.rows(key)) < tokens for key in keys):
        run.step()


def longest_gap_ns(run: Simulation, keys: list[int]) -> int:
    """Runs until these keys have all tokens; returns the longest time between two tokens of one key."""
    last, counts, longest_ns = dict.fromkeys(keys, run.now_ns), Counter[int](), 0
    left = {key: run.scheduler.by_key[key].max_new_tokens for key in keys}
    while any(len(run.rows(key)) < left[key] for key in keys):
        assert run.step()
        for key in keys:
            if (count := len(run.rows(key))) > counts[key]:
                longest_ns = max(longest_ns, run.now_ns - last[key])
                last[key], counts[key] = run.now_ns, count
    return longest_ns


def check_tokens(run: Simulation, requests: Mapping[int, GenerationRequest]) -> None:
    run.finish()
    for key, one in requests.items():
        assert run.rows(key) == expected(one, CONTEXT)[0]


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("slow_ms", [20, 45, 60, 180])
@pytest.mark.parametrize("group", ["", "n"])
def test_tokens_of_others_come_on_and_slow_answers_take_turns(stages: int, slow_ms: int, group: str) -> None:
    """Others wait for one of sixteen slow answers at a time, not for all of them. Another owner's quick matcher counts
    as one of these others."""
    run, model = simulation(lambda key, position: slow_ms * MS * (key <= 16), stages)
    requests = {run.add(one): one for one in (request(number, "a", 40, group) for number in range(16))}
    slow = [*requests]
    requests |= {run.add(one): one for one in (request(number, "b", 120, grammar=number == 0) for number in range(3))}
    until_known(run, slow)
    model.turns.clear()
    assert longest_gap_ns(run, [17, 18, 19]) <= max(_LEAST_NS, slow_ms * MS) + 3 * stages * STEP_NS
    counts = Counter(model.turns)
    assert min(counts[key] for key in slow) >= max(counts.values()) - 1 > 0
    check_tokens(run, requests)


@pytest.mark.parametrize("numbers", [(12, 3), (1, 10), (5, 5, 5)])
@pytest.mark.parametrize("slow_ms", [20, 60])
def test_owners_of_slow_answers_have_as_many_turns_as_others(numbers: tuple[int, ...], slow_ms: int) -> None:
    owner_of = dict[int, str]()
    run, model = simulation(lambda key, position: slow_ms * MS)
    requests = dict[int, GenerationRequest]()
    for owner, number in zip("abc", numbers, strict=False):
        for place in range(number):
            one = request(place, owner, 60)
            key = run.add(one)
            requests[key], owner_of[key] = one, owner
    until_known(run, requests)
    model.turns.clear()
    while len(model.turns) < 50:
        run.step()
    counts = Counter(owner_of[key] for key in model.turns)
    assert max(counts.values()) - min(counts.values()) <= 2
    check_tokens(run, requests)


def test_requests_of_one_owner_have_as_many_turns_as_others() -> None:
    """One of these requests has many answers."""
    run, model = simulation(lambda key, position: 60 * MS * (key != 1))
    requests = {run.add(one): one for one in (request(0, "b", 300), request(1, "a", 60, "single"))}
    requests |= {run.add(one): one for one in (request(number, "a", 60, "many") for number in range(10))}
    until_known(run, requests)
    model.turns.clear()
    while len(model.turns) < 40:
        run.step()
    assert 19 <= Counter(model.turns)[2] <= 21
    check_tokens(run, requests)


def test_slow_answers_of_one_owner_share_steps_while_nobody_else_waits() -> None:
    run, _ = simulation(lambda key, position: 60 * MS, stages=1)
    requests = {run.add(one): one for one in (request(number, "a", 30) for number in range(16))}
    until_known(run, requests)
    before = len(run.microbatches)
    check_tokens(run, requests)
    rows = [len(sent.inputs.tasks) for sent in run.microbatches[before:]]
    assert max(rows) == _MOST_NS // (60 * MS) and sum(rows) / len(rows) > 4


@pytest.mark.parametrize("every", [2, 3, 7])
def test_costs_that_come_and_go_keep_others_waiting_less(every: int) -> None:
    """An answer whose last step was quick counts as somewhat less slow than before."""
    run, _ = simulation(lambda key, position: 60 * MS * (key <= 16 and (position + key) % every == 0), stages=1)
    requests = {run.add(one): one for one in (request(number, "a", 60) for number in range(16))}
    requests |= {run.add(one): one for one in (request(number, "b", 150, grammar=False) for number in range(2))}
    until_known(run, range(1, 17))
    assert longest_gap_ns(run, [17, 18]) <= 5 * 60 * MS
    check_tokens(run, requests)


@pytest.mark.parametrize("claim", [5 * MS, 10_000 * MS, MAX_MATCHER_NS])
@pytest.mark.parametrize("stages", [1, 3])
def test_claims_of_a_lying_worker_stop_nobody(claim: int, stages: int) -> None:
    """Claimed times make answers take turns without need, but none waits for ever."""
    run, model = simulation(lambda key, position: claim, stages)
    model.begin = lambda scheduled: None  # type: ignore[method-assign]  # nothing takes so long
    requests = {run.add(one): one for one in (request(number, f"{number}", 20) for number in range(4))}
    requests |= {run.add(one): one for one in (request(number, "b", 20, grammar=False) for number in range(4))}
    check_tokens(run, requests)
    plain = [sent for sent in run.microbatches if any(chunk.outputs for chunk in sent.microbatch.chunks)]
    assert len(plain) <= 4 * 20 + 20


def test_forced_tokens_wait_for_a_turn_as_well() -> None:
    """A forced token follows each sampled token of a slow matcher, so that the next rows are known."""

    class Forcing(SlowMatchers):
        def _with_time(self, task: object, row: RowResult) -> RowResult:
            timed = super()._with_time(task, row)
            return replace(timed, forced=(7,)) if timed.matcher_ns else timed

    run, _ = simulation(lambda key, position: 60 * MS * (key <= 8), stages=1, kind=Forcing)
    for number in range(8):
        run.add(request(number, "a", 60))
    plain = request(0, "b", 100, grammar=False)
    key = run.add(plain)
    until_known(run, range(1, 9))
    assert longest_gap_ns(run, [key]) <= 2 * 60 * MS
    run.finish()
    assert run.rows(key) == expected(plain, CONTEXT)[0]


@pytest.mark.parametrize("owners", ["ab", "aa", "abcd"])
def test_a_slow_answer_that_is_computed_again_holds_up_no_turn(owners: str) -> None:
    """The answer's own turn comes with its last rows."""
    run, model = simulation(lambda key, position: 60 * MS, stages=1, prefix_cache=False, prefill_chunk=8)
    requests = {run.add(one): one for one in (request(number, owner, 300) for number, owner in enumerate(owners))}
    until_known(run, requests, tokens=250)
    queues, known, before = run.scheduler.queues, len(run.rows(1)), len(run.microbatches)
    queues.preempt(next(sequence for sequence in queues.running if sequence.key == 1))
    model.turns.clear()
    while len(run.rows(1)) <= known + 1:
        run.step()
        assert run.scheduler.by_key[1].matcher.is_slow
    assert len(run.microbatches) - before > 20
    assert len([key for key in model.turns if key != 1]) > 10
    check_tokens(run, requests)
