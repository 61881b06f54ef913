"""Requests to a real model in this process, under a scheduler with a simulated clock: each alone on one stage, or all
disturbed by cuts, chunks, other requests, few KV blocks, prefix hits and a lost worker."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from random import Random

import pytest

from llamaclust.cluster.scheduler.capacity import BlockCounts, Capacity
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafters
from llamaclust.cluster.scheduler.kv.groups import window_group
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.cluster.scheduler.speculation.mtp_drafts import MtpDrafts
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.limits import StageLimits
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.kernels.backend import Backend, Float32
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.microbatch.messages import Microbatch, SamplingInputs
from llamaclust.worker.stage.stage_runner import StageRunner
from support.arithmetic.batches import possible_cuts
from support.clusters.fakes import FakeModel, FakeStages, Simulation, linear
from support.plans.drafting import AnyWindows, SaidDrafters, replayed
from support.plans.mtp import AnyLengths

Answer = tuple[tuple[int, bytes], ...]
"""(token id, bytes of its float32 logprob) of every scored prompt token, then of every generated token."""

_SEEDED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1)
_GENERATED = 40
_LOST_AFTER = 6
_ROOM = 32  # KV blocks for all requests together
_SHORT = 7  # too few for two requests
_CHECKPOINTS = 8  # state blocks in addition to those of the sequences


class CutModel(FakeModel):
    """Stages of a real model in place of the fake model; `cuts` count parts of layers, `shards` per layer."""

    def __init__(
        self, backend: Backend, model: Model, cuts: Iterable[int], limits: StageLimits, shards: int = 1
    ) -> None:
        super().__init__(limits.kv_blocks)
        limits = replace(limits, expert_shards=shards)
        bounds = (0, *possible_cuts(model, cuts, shards), model.layer_count * shards)
        self.runners = [StageRunner(backend, model, start, end, limits) for start, end in pairwise(bounds)]

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        hidden: Float32 | None = None
        for runner in self.runners:
            hidden = runner.run(microbatch, hidden)
        assert hidden is not None
        return self.runners[-1].finish(hidden, inputs)

    def embeddings(self, microbatch: Microbatch) -> bytes:
        return self.runners[-1].embeddings()

    def close(self) -> None:
        for runner in self.runners:
            runner.close()


@cache
def requests(vocabulary: int) -> tuple[GenerationRequest, ...]:
    """Builds two requests with a common prefix of two blocks, one with a scored prompt and a short one; every other
    request is seeded, the rest are greedy."""
    source = Random(7)
    prompts = [[source.randrange(3, vocabulary) for _ in range(length)] for length in (37, 45, 21, 9)]
    prompts[1][:33] = prompts[0][:33]
    return tuple(
        GenerationRequest(
            f"request {number}",
            tuple(prompt),
            _GENERATED,
            _SEEDED if number % 2 else SamplingParams(),
            seed=number,
            score_from=1 if number == 2 else None,
        )
        for number, prompt in enumerate(prompts)
    )


def undisturbed(backend: Backend, model: Model, context: int) -> list[Answer]:
    """Answers each request alone on one stage, with its prompt in one chunk."""
    alone = Capacity(context_length=context, max_sequences=1, max_outputs=64, rows=63, prefix_cache=False)
    settings, limits = _sizes(model, alone, _ROOM, SpeculationSettings(NgramDrafters()))
    stages = CutModel(backend, model, (), limits)
    run = _simulation(settings, stages)
    try:
        return [_finished(run, [run.add(request)])[0] for request in requests(settings.vocabulary)]
    finally:
        stages.close()


Cuts = tuple[int, Sequence[int]]
"""The number of parts per layer, and the parts at which stages begin."""


def disturbed(
    backend: Backend,
    model: Model,
    context: int,
    known: Sequence[Answer],
    ways: tuple[Cuts, Cuts] | None = None,
    *,
    mtp: bool = False,
) -> list[Answer]:
    """Answers all requests together in chunks of five tokens, with KV blocks for fewer than two of them, then two again
    from the prefix cache. Nine of ten drafted tokens are those of the answers `known`. During decode the workers of two
    stages are lost; up to six stages, or those of `ways`, continue. With `mtp`, the MTP head drafts more often than
    would pay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "best_windows", AnyWindows(Random(5), 6))
        patch.setattr(MtpDrafts, "length", AnyLengths(Random(6), 6).length)
        return _disturbed(backend, model, context, known, ways, mtp)


def _disturbed(
    backend: Backend, model: Model, context: int, known: Sequence[Answer], ways: tuple[Cuts, Cuts] | None, mtp: bool
) -> list[Answer]:
    vocabulary = model.hyperparameters.vocabulary_size
    asked = requests(vocabulary)
    texts = [
        [*request.prompt, *(token for token, _ in answer[-request.max_new_tokens :])]
        for request, answer in zip(asked, known, strict=True)
    ]
    says = replayed(texts, 0.9, Random(3), vocabulary)
    crowded = Capacity(context_length=context, max_sequences=4, max_outputs=24, rows=20, prefill_chunk=5, mtp=mtp)
    settings, limits = _sizes(model, crowded, _SHORT, SpeculationSettings(SaidDrafters(says), mtp=mtp))
    count = model.layer_count
    (shards, cuts), (later_shards, later) = ways or ((1, (count // 2,)), (1, range(1, count, -(-count // 5))))
    first = CutModel(backend, model, cuts, limits, shards)
    run = _simulation(settings, first)
    keys = [run.add(request) for request in asked]
    while len(run.rows(keys[0])) < _LOST_AFTER:
        run.step()
    run.send_all()
    run.sent.clear()
    first.close()
    second = CutModel(backend, model, later, limits, later_shards)
    run.stages = _stages(second)
    run.scheduler.restart(settings, 2, len(second.runners))
    try:
        answers = _finished(run, keys)
        before = run.scheduler.counts.cached_tokens
        again = _finished(run, [run.add(request) for request in asked[:2]])
    finally:
        second.close()
    counts = run.scheduler.counts
    assert counts.preemptions > 0 and counts.cached_tokens > before, (counts.preemptions, counts.cached_tokens)
    drafted = sum(chunk.outputs > 1 for sent in run.microbatches for chunk in sent.microbatch.chunks)
    assert drafted > 0, "no rows were drafted"
    assert again == answers[:2]
    suggested = sum(chunk.drafts > 0 for sent in run.microbatches for chunk in sent.microbatch.chunks)
    assert not mtp or suggested > 20, suggested
    return answers


def _sizes(
    model: Model, capacity: Capacity, kv_blocks: int, speculation: SpeculationSettings
) -> tuple[SchedulerSettings, StageLimits]:
    """Returns settings and limits; layers with a window release the KV blocks behind it."""
    sequences = capacity.max_sequences
    group = window_group(model.window, capacity.context_length, capacity.max_batch_tokens)
    window = 0 if group is None else sequences * group.sequence_blocks + group.row_blocks
    blocks = BlockCounts(kv_blocks, window, sequences + _CHECKPOINTS if model.has_states else 0)
    settings = capacity.scheduler_settings(model, blocks, speculation)
    return replace(settings, state_span=2 * KV_BLOCK_TOKENS), capacity.stage_limits(blocks)


def _stages(model: CutModel) -> FakeStages:
    return FakeStages(model, [linear(100, 10)] * len(model.runners))


def _simulation(settings: SchedulerSettings, model: CutModel) -> Simulation:
    return Simulation(Scheduler(settings, 1, len(model.runners)), _stages(model))


def _finished(run: Simulation, keys: Sequence[int]) -> list[Answer]:
    run.finish()
    return [_answer([row for _, row in sorted(run.scores(key).items())] + run.rows(key)) for key in keys]


def _answer(rows: Sequence[RowResult]) -> Answer:
    return tuple((row.token, struct.pack("<f", row.logprob)) for row in rows)
