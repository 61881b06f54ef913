"""Tests of grammars of answers on their way to the last stage: sent once, released, and their forced tokens."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from random import Random

from llamaclust.cluster.scheduler.requests import Failed, GenerationRequest, TokenSampled
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.sampler.matchers import Grammar, MatcherStart
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import MatcherRow, RowTask, SampleTask
from llamaclust.wire.microbatch.messages import Microbatch, Result, SamplingInputs
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, expected, linear
from support.seed import SEED

SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=512, kv_blocks=128)
GRAMMAR = Grammar('{"grammars": []}')


def generation(name: str, tokens: int = 20, **fields: object) -> GenerationRequest:
    prompt = tuple(range(1, 20))
    return GenerationRequest(name, prompt, tokens, grammar=GRAMMAR, **fields)  # type: ignore[arg-type]


def simulated(hop_us: float = 100) -> Simulation:
    fake = FakeStages(FakeModel(SETTINGS.kv_blocks), [linear(1000, 1)], round(hop_us * 1000))
    return Simulation(Scheduler(SETTINGS, epoch=1, stages=1), fake)


def rows_of(inputs: SamplingInputs) -> list[MatcherRow]:
    return [task.matcher for task in inputs.tasks if isinstance(task, SampleTask) and task.matcher is not None]


def test_a_grammar_is_sent_with_the_first_tokens_and_released_at_the_end() -> None:
    """The grammar is sent before the sampled row if the prompt takes several microbatches."""
    run = simulated()
    run.scheduler.settings = replace(SETTINGS, max_batch_tokens=8, max_sequences=4)
    key = run.add(generation("a"))
    run.finish()
    starts = [sent.inputs.starts for sent in run.microbatches]
    assert starts == [(MatcherStart(key, GRAMMAR, may_force=True),)] + [()] * (len(starts) - 1)
    assert not run.microbatches[0].inputs.tasks
    rows = [row for sent in run.microbatches for row in rows_of(sent.inputs)]
    assert [row.position for row in rows] == list(range(len(rows))), "known or not, each row has the next place"
    assert {row.key for row in rows} == {key}
    run.add(generation("b"))
    run.step()
    assert run.microbatches[len(starts)].inputs.released == (key,)


def test_a_start_has_its_owners_number() -> None:
    """Equal owners have equal numbers, which fit into 32 bits and are not parts of their names."""
    run = simulated()
    names = ["12345", "10.0.0.7", "ab" * 16]
    for name in (*names, *names):
        run.add(generation(f"{name} {len(run.scheduler.queues.waiting)}", 4, owner=name))
    run.finish()
    owners = [start.owner for sent in run.microbatches for start in sent.inputs.starts]
    assert owners[:3] == owners[3:] and len(set(owners)) == 3
    assert all(0 <= number < 1 << 32 and str(number) not in names for number in owners)


def test_a_preempted_answer_starts_again_from_its_tokens() -> None:
    run = simulated()
    key = run.add(generation("a", 30))
    while len(run.rows(key)) < 10:
        run.step()
    before = len(run.microbatches)
    run.scheduler.queues.preempt(run.scheduler.queues.running[0])
    run.finish()
    tokens = tuple(row.token for row in run.rows(key))
    (again,) = [start for sent in run.microbatches[before:] for start in sent.inputs.starts]
    assert again == MatcherStart(key, GRAMMAR, tokens[: len(again.tokens)], may_force=True) and len(again.tokens) >= 10
    assert any(sent.inputs.released == (key,) for sent in run.microbatches[before:])


def test_few_grammars_start_in_one_microbatch() -> None:
    settings = replace(SETTINGS, max_sequences=60, kv_blocks=1024)
    fake = FakeStages(FakeModel(settings.kv_blocks), [linear(1, 1)], 1)
    run = Simulation(Scheduler(settings, epoch=1, stages=1), fake)
    for number in range(50):
        run.add(generation(f"{number}", 2))
    run.finish()
    starts = [len(sent.inputs.starts) for sent in run.microbatches]
    assert sum(starts) == 50 and max(starts) <= 32


def answer(scheduler: Scheduler, token: int, forced: tuple[int, ...] = ()) -> list[RowResult]:
    """Completes the microbatch that is due, which has one output row, and returns the new tokens."""
    sent = scheduler.in_flight._sent[0]
    ((_, updates),) = scheduler.complete(
        Result(1, sent.number, (RowResult(token, -1.0, forced=forced),)), 1
    ).updated or [(0, [])]
    return [update.row for update in updates if isinstance(update, TokenSampled)]


class DeferringModel(FakeModel):
    """A model whose matchers are not ready for a third of the rows; rows sent behind these are deferred as well."""

    def __init__(self, kv_blocks: int, source: Random) -> None:
        super().__init__(kv_blocks)
        self.deferred = 0
        self.deferred_lookahead = 0
        self._source = source
        self._due: dict[int, int] = {}  # positions of deferred rows, by key

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        rows = super().run(microbatch, inputs)
        return tuple(self._result(task, row) for task, row in zip(inputs.tasks, rows, strict=True))

    def _result(self, task: RowTask, row: RowResult) -> RowResult:
        if not isinstance(task, SampleTask) or task.matcher is None:
            return row
        key, position = task.matcher.key, task.matcher.position
        is_lookahead = self._due.get(key, position) < position
        if not is_lookahead and self._source.random() > 1 / 3:
            self._due.pop(key, None)
            return row
        self._due.setdefault(key, position)
        self.deferred += 1
        self.deferred_lookahead += is_lookahead
        return RowResult(-1, nan, is_deferred=True)


def test_deferred_rows_are_computed_again_and_change_nothing() -> None:
    """Covers lookahead rows, preemption, scored prompts, the prefix cache, and sampling."""
    settings = replace(SETTINGS, max_batch_tokens=24, max_sequences=6, kv_blocks=24)
    deferred = ahead = preemptions = 0
    for seed in range(SEED, SEED + 12):
        source = Random(seed)
        requests = [
            GenerationRequest(
                str(number),
                (*range(1, 20), *(source.randrange(VOCABULARY) for _ in range(source.randrange(20)))),
                source.randrange(1, 120),
                source.choice([SamplingParams(repetition_penalty=1.1), SamplingParams()]),
                seed=number,
                stop_token_ids=frozenset({7, 8}),
                grammar=source.choice([GRAMMAR, GRAMMAR, None]),
                score_from=source.choice([None, 5]),
            )
            for number in range(source.randrange(1, 9))
        ]
        model = DeferringModel(settings.kv_blocks, source)
        fake = FakeStages(model, [linear(100, 1)] * 2, 3_000_000)
        run = Simulation(Scheduler(settings, epoch=1, stages=2), fake)
        keys = [run.add(request) for request in requests]
        while run.step():
            if (running := run.scheduler.queues.running) and source.random() < 0.02:
                run.scheduler.queues.preempt(running[-1])
        for key, request in zip(keys, requests, strict=True):
            rows, scored, _ = expected(request, settings.context_length)
            assert (run.rows(key), run.scores(key)) == (rows, scored), f"seed {seed}, request {request.request_id}"
        assert not run.scheduler.sequences and not run.scheduler.counts.kv_blocks_held
        deferred, ahead = deferred + model.deferred, ahead + model.deferred_lookahead
        preemptions += run.scheduler.counts.preemptions
    assert deferred > 100 and ahead > 0 and preemptions > 0


def test_forced_tokens_are_computed_together() -> None:
    scheduler = Scheduler(SETTINGS, epoch=1, stages=1)
    scheduler.add(generation("a"), 1)
    assert scheduler.next_microbatch(1) is not None
    added = answer(scheduler, 5, (6, 7))
    assert added == [RowResult(5, -1.0, forced=(6, 7)), RowResult(6, 0.0), RowResult(7, 0.0)]
    following = scheduler.next_microbatch(2)
    assert following is not None
    assert following.microbatch.chunks[0].tokens == (5, 6, 7)
    assert rows_of(following.inputs) == [MatcherRow(1, 3)]


def test_forced_tokens_end_where_the_request_does() -> None:
    scheduler = Scheduler(SETTINGS, epoch=1, stages=1)
    scheduler.add(generation("a", 2), 1)
    scheduler.add(generation("b", stop_token_ids=frozenset({6}), cache_salt="b"), 1)
    sent = scheduler.next_microbatch(1)
    assert sent is not None and len(sent.inputs.tasks) == 2
    rows = (RowResult(5, -1.0, forced=(8, 9, 10)), RowResult(5, -1.0, forced=(6, 7)))
    updated = scheduler.complete(Result(1, 0, rows), 1).updated
    tokens = [[update.row.token for update in updates if isinstance(update, TokenSampled)] for _, updates in updated]
    assert tokens == [[5, 8], [5, 6]] and not scheduler.sequences


def test_a_row_that_was_sent_before_the_forced_tokens_were_known_adds_none_twice() -> None:
    run = simulated()
    key = run.add(generation("a", 60))
    while not any(chunk.depends_on for sent in run.microbatches for chunk in sent.microbatch.chunks):
        run.step()
        run.send_all()
    scheduler, known = run.scheduler, len(run.rows(key))
    assert len(scheduler.in_flight) == 2, "a row, and the one after it"
    assert [row.token for row in answer(scheduler, 5, (6, 7))] == [5, 6, 7]
    assert answer(scheduler, 6, (7,)) == []
    following = scheduler.next_microbatch(run.now_ns)
    assert following is not None
    assert following.microbatch.chunks[0].tokens == (6, 7)
    assert rows_of(following.inputs)[0].position == known + 3


def test_a_failure_that_is_the_requests_fault_ends_it_at_once_and_another_is_tried_again() -> None:
    scheduler = Scheduler(SETTINGS, epoch=1, stages=1)
    fault, other = scheduler.add(generation("a"), 1), scheduler.add(generation("b", cache_salt="b"), 1)
    sent = scheduler.next_microbatch(1)
    assert sent is not None and len(sent.inputs.tasks) == 2
    rows = tuple(RowResult(-1, nan, failure="no end", is_request_fault=is_fault) for is_fault in (True, False))
    assert scheduler.complete(Result(1, 0, rows), 1).updated == [(fault.key, [Failed("no end", is_request_fault=True)])]
    assert [*scheduler.sequences] == [other]
