"""Tests the scheduler with layers that keep a state of each sequence; rows of a fake model update states in order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.speculation import speculation
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.core.limits import StageLimits
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import RowTask, SampleTask
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs
from support.clusters.fakes import VOCABULARY, FakeModel, FakeStages, Simulation, blocks_of, expected, linear
from support.plans.drafting import AnyWindows, SaidDrafters, Says, replayed
from support.wire.batches import batch_states


@dataclass
class StatefulModel(FakeModel):
    """A model whose states are hashes of all tokens so far: an update that is repeated, or of a wrong state, is
    noticed."""

    state_blocks: int = 0
    deferring: random.Random | None = None  # some sampled rows, and the rows sent behind them
    due: dict[int, int] = field(default_factory=dict)  # positions of deferred rows by seed
    states: dict[int, bytes] = field(default_factory=dict)
    resumed: set[int] = field(default_factory=set)  # positions at which sequences began behind checkpoints

    def run(self, microbatch: Microbatch, inputs: SamplingInputs) -> tuple[RowResult, ...]:
        chunks = microbatch.chunks
        if self.state_blocks:
            batch_states(chunks, StageLimits(1, 1, 1, 1, 1, state_blocks=self.state_blocks))
        before = [self._before(chunk) for chunk in chunks]
        rows = super().run(microbatch, inputs)
        for chunk, state in zip(chunks, before, strict=True):
            for row, token in enumerate(chunk.tokens):
                state = _next(state, token)
                if (block := self._written(chunk, row)) is not None:
                    self.states[block] = state
            assert state == _after(self._read(blocks_of(chunk), chunk.position + len(chunk.tokens)))
        answers, tasks = iter(rows), iter(inputs.tasks)
        return tuple(row for chunk in chunks for row in self._chunk_rows(chunk, tasks, answers))

    def _chunk_rows(self, chunk: Chunk, tasks: Iterator[RowTask], rows: Iterator[RowResult]) -> Iterator[RowResult]:
        """Drafted rows count only behind rows that sampled their tokens; only rows that count are deferred."""
        before: RowResult | None = None
        for token in chunk.tokens[len(chunk.tokens) - chunk.outputs :]:
            task, row = next(tasks), next(rows)
            if isinstance(task, SampleTask):
                counts = before is None or before.token == token
                row = self._deferred(task, row) if counts else replace(row, token=-1)
                before = row
            yield row

    def _deferred(self, task: SampleTask, row: RowResult) -> RowResult:
        if self.deferring is None or task.matcher is None:
            return row
        is_behind = self.due.get(task.seed, task.position) != task.position
        if not is_behind and self.deferring.random() < 0.8:
            self.due.pop(task.seed, None)
            return row
        self.due.setdefault(task.seed, task.position)
        return RowResult(-1, nan, is_deferred=True)

    def _before(self, chunk: Chunk) -> bytes:
        if chunk.position == 0:
            return b""
        block = chunk.state_from
        if block is None:
            block = blocks_of(chunk)[(chunk.position - 1) // KV_BLOCK_TOKENS]
        elif block != chunk.state_to[-1]:
            self.resumed.add(chunk.position)
        state = self.states[block]
        assert state == _after(self._read(blocks_of(chunk), chunk.position)), "a state behind another position"
        return state

    def _written(self, chunk: Chunk, row: int) -> int | None:
        """Returns the block that receives the state after a row."""
        if not self.state_blocks:
            return blocks_of(chunk)[(chunk.position + row) // KV_BLOCK_TOKENS]
        return dict(zip(chunk.state_to[::2], chunk.state_to[1::2], strict=True)).get(row + 1)


def _next(state: bytes, token: int) -> bytes:
    return sha256(state + bytes([token])).digest()


def _after(tokens: list[int]) -> bytes:
    state = b""
    for token in tokens:
        state = _next(state, token)
    return state


def simulation(source: random.Random, says: Says) -> Simulation:
    """Makes a simulation with states in blocks of their own or, like the profiler and `bench`, in those of all
    layers."""
    chosen = SchedulerSettings(
        "m",
        VOCABULARY,
        context_length=200,
        kv_blocks=source.randint(13, 60),
        max_sequences=source.randint(1, 8),
        max_batch_tokens=source.choice([16, 64, 128]),
        max_outputs=32,
        prefill_chunk=source.choice([None, 1, 5, 16, 50]),
        prefix_cache=source.random() < 0.8,
    )
    model = StatefulModel(chosen.kv_blocks, deferring=source if source.random() < 0.5 else None)
    chosen = replace(chosen, has_states=True)
    if source.random() < 0.8:
        model.state_blocks = source.choice([2, 3, chosen.max_sequences + 1, chosen.max_sequences + 12])
        span = source.choice([16, 16, 32, 64])
        chosen = replace(chosen, state_blocks=model.state_blocks, state_span=span)
        if source.random() < 0.7:
            chosen = replace(chosen, speculation=SpeculationSettings(SaidDrafters(says), source.choice([1, 3, 32])))
    stages = source.randint(1, 4)
    return Simulation(Scheduler(chosen, 1, stages), FakeStages(model, [linear(100, 10)] * stages, 1000))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rows_find_the_state_behind_the_position_before_them(seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _rows_find_the_state(seed, patch)


def _rows_find_the_state(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(seed)
    texts: list[list[int]] = []
    run = simulation(source, replayed(texts, source.choice([0.5, 0.9, 1.0]), source, VOCABULARY))
    monkeypatch.setattr(speculation, "best_windows", AnyWindows(source, 32))
    requests: dict[int, GenerationRequest] = {}
    for number in range(source.randint(2, 10)):
        start, length = source.randint(0, 1), source.choice([2, 15, 16, 17, 48, 97, 150])
        prompt = tuple((start + 7 * i) % VOCABULARY for i in range(length))
        tokens = source.choice([1, 3, 30, 90])
        grammar = Grammar("{}") if source.random() < 0.5 else None  # rows without a grammar are never deferred
        first = None if grammar else source.choice([None, 5])
        request = GenerationRequest("r", prompt, tokens, seed=number, score_from=first, grammar=grammar)
        request = replace(request, owner=source.choice("aab"))
        answer = expected(request, run.scheduler.settings.max_sequence_tokens)[0]
        texts.append([*prompt, *(row.token for row in answer)])
        requests[run.add(request)] = request
        for _ in range(source.choice([0, 0, 1, 5, 20])):
            run.step()
        if source.random() < 0.15 and run.scheduler.abort(victim := source.choice(list(requests))) is not None:
            del requests[victim]
    run.finish()
    for key, request in requests.items():
        chosen, scored, _ = expected(request, run.scheduler.settings.max_sequence_tokens)
        assert (run.rows(key), run.scores(key)) == (chosen, scored)
