"""Tests of tokens that a grammar forces, computed as drafts: fewer steps, the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from llamaclust.cluster.scheduler.drafting.drafter import CLASSES, FORCED, LONG, Draft
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation import speculation as module
from llamaclust.cluster.scheduler.speculation.acceptance import Acceptance
from llamaclust.cluster.scheduler.speculation.drafts import SequenceDrafts
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import MatcherRow, SampleTask
from llamaclust.wire.microbatch.messages import Microbatch, SamplingInputs
from llamaclust.worker.stage.matched_answer import DEFERRED
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, expected, linear
from support.plans.drafting import AnyWindows, SaidDrafters, Says, nonsense
from support.seed import SEED

SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=512, kv_blocks=128)
GRAMMAR = Grammar('{"grammars": []}')
FREE_EVERY = 8
"""One token is sampled, the next seven are forced."""


def generation(prompt: Sequence[int], tokens: int, **fields: object) -> GenerationRequest:
    request = GenerationRequest("r", tuple(prompt), tokens, grammar=GRAMMAR, with_logprobs=True)
    return replace(request, **fields)  # type: ignore[arg-type]


@dataclass
class ForcingModel(FakeModel):
    """A model whose results have the forced tokens up to the next sampled one; some of these are wrong."""

    answers: tuple[tuple[int, ...], ...] = ()  # prompts and answers, known beforehand
    prompt: int = 0  # tokens of each prompt
    wrong: Random | None = None
    deferred: Random | None = None
    due: dict[int, int] = field(default_factory=dict)  # positions of deferred rows, by key

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        rows = super().run(microbatch, inputs)
        tables = [self._read(self._table(chunk), chunk.position + len(chunk.tokens)) for chunk in microbatch.chunks]
        found, tasks, place = [], inputs.tasks, 0
        for tokens, chunk in zip(tables, microbatch.chunks, strict=True):
            for row in range(len(chunk.tokens) - chunk.outputs, len(chunk.tokens)):
                task, before = tasks[place], tokens[: chunk.position + row + 1]
                assert isinstance(task, SampleTask) and task.matcher is not None
                found.append(DEFERRED if self._defers(task.matcher) else self._result(before, rows[place]))
                place += 1
        return tuple(found)

    def _defers(self, row: MatcherRow) -> bool:
        """Returns whether a row is deferred; rows behind a deferred row are deferred, too."""
        is_behind = self.due.get(row.key, row.position) < row.position
        if not is_behind and (self.deferred is None or self.deferred.random() > 0.1):
            self.due.pop(row.key, None)
            return False
        self.due.setdefault(row.key, row.position)
        return True

    def _result(self, before: Sequence[int], row: RowResult) -> RowResult:
        known = (*before, row.token)
        answer = next((each for each in self.answers if each[: len(known)] == known), known)
        end = (len(known) - self.prompt) // FREE_EVERY * FREE_EVERY + self.prompt
        end += FREE_EVERY if end < len(known) else 0
        draft = answer[len(known) : end]
        if self.wrong is not None and self.wrong.random() < 0.2:
            draft = tuple((token + 1) % VOCABULARY for token in draft)
        return replace(row, forced_draft=draft)


def simulated(
    requests: Sequence[GenerationRequest],
    says: Says = lambda tokens, most: (),
    stages: int = 1,
    wrong: Random | None = None,
    deferred: Random | None = None,
) -> Simulation:
    settings = replace(SETTINGS, speculation=SpeculationSettings(SaidDrafters(says)))
    texts = tuple((*each.prompt, *(row.token for row in expected(each, 512)[0])) for each in requests)
    model = ForcingModel(SETTINGS.kv_blocks, {}, 0, texts, len(requests[0].prompt), wrong, deferred)
    fake = FakeStages(model, [linear(1000, 1)] * stages, 500_000)
    run = Simulation(Scheduler(settings, epoch=1, stages=stages), fake)
    for request in requests:
        run.add(request)
    return run


def check(run: Simulation, requests: Sequence[GenerationRequest]) -> None:
    for key, request in enumerate(requests, 1):
        rows = [replace(row, forced_draft=()) for row in run.rows(key)]
        assert rows == expected(request, SETTINGS.context_length)[0], f"seed {SEED}"


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_forced_tokens_are_computed_in_one_step(stages: int) -> None:
    """Each row has the history that penalties need. Lookahead rows would each compute one forced token alone."""
    requests = [generation(range(1, 20), 160, params=SamplingParams(0.8, repetition_penalty=1.1))]
    run = simulated(requests, stages=stages)
    run.finish()
    check(run, requests)
    assert len(run.microbatches) < 160 / FREE_EVERY * 1.5 + 10
    assert run.scheduler.drafts.accepted == run.scheduler.drafts.drafted > 100
    assert not any(chunk.depends_on for sent in run.microbatches for chunk in sent.microbatch.chunks)


def test_forced_tokens_go_before_drafts_that_say_otherwise() -> None:
    requests = [generation(range(1, 20), 160)]
    run = simulated(requests, says=nonsense(Random(SEED), VOCABULARY))
    run.finish()
    check(run, requests)
    assert len(run.microbatches) < 160 / FREE_EVERY * 2 + 10


def test_answers_without_drafts_ask_for_no_forced_ones() -> None:
    run = simulated([generation(range(1, 20), 20, max_drafted=0)])
    run.finish()
    plain = Simulation(Scheduler(SETTINGS, 1, 1), run.stages)
    assert [start.drafts_forced for sent in run.microbatches for start in sent.inputs.starts] == [False]
    plain.add(generation(range(1, 20), 20))
    sent = plain.scheduler.next_microbatch(1)
    assert sent is not None and [start.drafts_forced for start in sent.inputs.starts] == [False]


@pytest.mark.parametrize("seed", range(SEED, SEED + 8))
def test_forced_drafts_change_no_row(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are right or wrong, beside others, in windows of any size; rows are deferred, sequences preempted."""
    source = Random(seed)
    prompts = [[source.randrange(VOCABULARY) for _ in range(19)] for _ in range(source.randrange(1, 6))]
    requests = [
        generation(prompt, source.randrange(1, 120), seed=seed, stop_token_ids=frozenset({7}), min_tokens=number % 9)
        for number, prompt in enumerate(prompts)
    ]
    run = simulated(requests, nonsense(source, VOCABULARY), source.randrange(1, 4), source, source)
    monkeypatch.setattr(module, "best_windows", AnyWindows(source, 32))
    while run.step():
        if (running := run.scheduler.queues.running) and source.random() < 0.02:
            run.scheduler.queues.preempt(running[-1])
    check(run, requests)
    assert not run.scheduler.sequences and not run.scheduler.counts.kv_blocks_held


class _Says:
    def __init__(self, *tokens: int) -> None:
        self._tokens = tokens

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        return Draft(self._tokens, LONG)


def _drafts(*said: int) -> SequenceDrafts:
    return SequenceDrafts(_Says(*said), VOCABULARY, [Acceptance() for _ in range(CLASSES)])


def test_a_draft_that_begins_with_the_forced_tokens_goes_on_behind_them() -> None:
    candidate = _drafts(5, 6, 7, 8).next([1, 2], 3, forced=(5, 6))
    assert (candidate.tokens, candidate.forced) == ((5, 6, 7), 2)
    assert candidate.gain(2) > 0.95 > candidate.gain(3) == candidate.gain(2) * candidate.rate
    assert _drafts(5, 6, 7, 8).next([1, 2], 1, forced=(5, 6)).forced == 1


def test_another_draft_gives_way_to_the_forced_tokens() -> None:
    candidate = _drafts(5, 9, 7, 8).next([1, 2], 9, forced=(5, 6))
    assert (candidate.tokens, candidate.forced) == ((5, 6), 2)
    assert candidate.most_gain == 2 and candidate.gain(2) > 0.95
    assert _drafts(5, 9, 7, 8).next([1, 2], 9).tokens == (5, 9, 7, 8)


def test_forced_tokens_that_turn_out_wrong_count_less() -> None:
    drafts = _drafts(5, 6, 7)
    before, other = drafts.rate(FORCED), drafts.rate(LONG)
    for length in range(2, 12):
        drafts.next([0] * length, 9, forced=(9, 9))
    assert drafts.rate(FORCED) < before / 2 and drafts.rate(LONG) == other
