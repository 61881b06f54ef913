"""Grammars of answers on their way to the last stage: sent once, released, and the tokens that they force."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.cluster.scheduler.requests import GenerationRequest, TokenSampled
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.sampling import Grammar, GrammarRow, GrammarStart, RowResult, SampleTask
from llamaclust.wire.microbatch.messages import Result, SamplingInputs
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, linear

SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=512, kv_blocks=128)
GRAMMAR = Grammar('{"grammars": []}')


def generation(name: str, tokens: int = 20, **fields: object) -> GenerationRequest:
    prompt = tuple(range(1, 20))
    return GenerationRequest(name, prompt, tokens, grammar=GRAMMAR, **fields)  # type: ignore[arg-type]


def simulated(hop_us: float = 100) -> Simulation:
    fake = FakeStages(FakeModel(SETTINGS.kv_blocks), [linear(1000, 1)], round(hop_us * 1000))
    return Simulation(Scheduler(SETTINGS, epoch=1, stages=1), fake)


def rows_of(inputs: SamplingInputs) -> list[GrammarRow]:
    return [task.grammar for task in inputs.tasks if isinstance(task, SampleTask) and task.grammar is not None]


def test_a_grammar_is_sent_with_the_first_row_and_released_at_the_end() -> None:
    run = simulated()
    key = run.add(generation("a"))
    run.finish()
    rows = [row for sent in run.microbatches for row in rows_of(sent.inputs)]
    assert [row.start for row in rows] == [GrammarStart(GRAMMAR, ())] + [None] * (len(rows) - 1)
    assert [row.position for row in rows] == list(range(len(rows))), "known or not, each row has the next place"
    assert {row.key for row in rows} == {key}
    run.add(generation("b"))
    run.step()
    assert run.microbatches[len(rows)].inputs.released == (key,)


def test_a_preempted_answer_starts_again_from_its_tokens() -> None:
    run = simulated()
    key = run.add(generation("a", 30))
    while len(run.rows(key)) < 10:
        run.step()
    before = len(run.microbatches)
    run.scheduler.queues.preempt(run.scheduler.queues.running[0])
    run.finish()
    tokens = tuple(row.token for row in run.rows(key))
    starts = [row for sent in run.microbatches[before:] for row in rows_of(sent.inputs) if row.start is not None]
    (again,) = starts
    assert again.start == GrammarStart(GRAMMAR, tokens[: again.position]) and again.position >= 10
    assert any(sent.inputs.released == (key,) for sent in run.microbatches[before:])


def test_few_grammars_start_in_one_microbatch() -> None:
    settings = replace(SETTINGS, max_sequences=60, kv_blocks=1024)
    fake = FakeStages(FakeModel(settings.kv_blocks), [linear(1, 1)], 1)
    run = Simulation(Scheduler(settings, epoch=1, stages=1), fake)
    for number in range(50):
        run.add(generation(f"{number}", 2))
    run.finish()
    starts = [sum(row.start is not None for row in rows_of(sent.inputs)) for sent in run.microbatches]
    assert sum(starts) == 50 and max(starts) <= 32


def answer(scheduler: Scheduler, token: int, forced: tuple[int, ...] = ()) -> list[RowResult]:
    """The result of the microbatch that is due, which has one output row; the tokens that are new with it."""
    sent = scheduler.in_flight._sent[0]
    ((_, updates),) = scheduler.complete(Result(1, sent.number, (RowResult(token, -1.0, forced=forced),)), 1) or [
        (0, [])
    ]
    return [update.row for update in updates if isinstance(update, TokenSampled)]


def test_forced_tokens_are_computed_together() -> None:
    scheduler = Scheduler(SETTINGS, epoch=1, stages=1)
    scheduler.add(generation("a"), 1)
    assert scheduler.next_microbatch(1) is not None
    added = answer(scheduler, 5, (6, 7))
    assert added == [RowResult(5, -1.0, forced=(6, 7)), RowResult(6, 0.0), RowResult(7, 0.0)]
    following = scheduler.next_microbatch(2)
    assert following is not None
    assert following.microbatch.chunks[0].tokens == (5, 6, 7)
    assert rows_of(following.inputs) == [GrammarRow(1, 3, None, may_force=True)]


def test_forced_tokens_end_where_the_request_does() -> None:
    scheduler = Scheduler(SETTINGS, epoch=1, stages=1)
    scheduler.add(generation("a", 2), 1)
    scheduler.add(generation("b", stop_token_ids=frozenset({6}), cache_salt="b"), 1)
    sent = scheduler.next_microbatch(1)
    assert sent is not None and len(sent.inputs.tasks) == 2
    rows = (RowResult(5, -1.0, forced=(8, 9, 10)), RowResult(5, -1.0, forced=(6, 7)))
    updated = scheduler.complete(Result(1, 0, rows), 1)
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
