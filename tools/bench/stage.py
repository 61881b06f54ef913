"""Measures the speed of one stage with a whole model, in the calling thread and without the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

import numpy as np

from llamaclust.cluster.scheduler.capacity import BlockCounts, Capacity, blocks_of
from llamaclust.cluster.scheduler.rows.chunking import chunk_rows
from llamaclust.cluster.scheduler.stage_times import StageTimes
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.limits import StageLimits
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import RowTask, SampleTask
from llamaclust.kernels.backend import CacheCounts
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs, StageTiming
from llamaclust.worker.stage.stage_runner import StageRunner

_EPOCH = 1
_SEED = 20_240_601
_SETTLE_S = 30.0


def stage_limits(batch: int, context: int, kv_type: KvType = KvType.F16) -> StageLimits:
    return _capacity(batch, context, kv_type).stage_limits(BlockCounts(blocks_of(context) * batch))


def _capacity(batch: int, context: int, kv_type: KvType) -> Capacity:
    return Capacity(context_length=context, max_sequences=batch, max_outputs=batch, kv_type=kv_type)


class BenchStage:
    """A loaded stage that processes `max_sequences` sequences of random tokens."""

    def __init__(self, model: Model, runner: StageRunner) -> None:
        limits = runner.limits
        batch, context = limits.max_sequences, limits.max_context_tokens
        blocks = limits.kv_blocks // batch
        self._runner = runner
        self._tables = [(blocks * index, blocks) for index in range(batch)]
        self._model_id = model.model_id
        vocabulary = model.hyperparameters.vocabulary_size
        random = np.random.default_rng(_SEED)
        self._tokens = [tuple(map(int, random.integers(0, vocabulary, context))) for _ in range(batch)]
        self._times = StageTimes(1)
        capacity = _capacity(batch, context, KvType(limits.kv_type))
        self._settings = capacity.scheduler_settings(model, BlockCounts(limits.kv_blocks))

    def prefill(self, tokens: int, sequences: int | None = None) -> float:
        """Returns the seconds to prefill `tokens` tokens of each sequence, one sequence after another. `sequences` is
        the number of sequences, or None for all sequences."""
        started_ns = perf_counter_ns()
        for index in range(len(self._tables[:sequences])):
            for start, rows in self._chunks(tokens):
                outputs = int(start + rows == tokens)
                part = self._tokens[index][start : start + rows]
                self._run([Chunk(part, start, self._tables[index], outputs)], [self._task(tokens)] * outputs)
        return (perf_counter_ns() - started_ns) / 1e9

    def decode(self, depth: int, steps: int, sequences: int | None = None) -> float:
        """Returns the seconds that `steps` decode steps take after `depth` tokens. `sequences` is the batch size, or
        None for all sequences."""
        last = [tokens[depth] for tokens in self._tokens[:sequences]]
        started_ns = perf_counter_ns()
        for position in range(depth, depth + steps):
            chunks = [Chunk((token,), position, table, 1) for token, table in zip(last, self._tables, strict=False)]
            last = self._run(chunks, [self._task(position + 1)] * len(chunks))
        return (perf_counter_ns() - started_ns) / 1e9

    @property
    def has_copies(self) -> bool:
        return any(stage.cache is not None for stage in self._runner.split_stages)

    @property
    def copies(self) -> CacheCounts:
        return self._runner.experts_cache

    @contextmanager
    def without_copies(self) -> Iterator[None]:
        """Disables the GPU's cache of experts until the context ends."""
        stages = self._runner.split_stages
        caches = [stage.cache for stage in stages]
        for stage, cache in zip(stages, caches, strict=True):
            if cache is not None:
                cache.settle(_SETTLE_S)
            stage.cache = None
        try:
            yield
        finally:
            for stage, cache in zip(stages, caches, strict=True):
                stage.cache = cache

    def close(self) -> None:
        self._runner.close()

    def _chunks(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Divides a prompt into chunks. Yields each chunk's start and number of tokens."""
        start = 0
        while start < tokens:
            rows = min(chunk_rows(self._settings, self._times, tokens, tokens - start, 0, alone=True), tokens - start)
            yield start, rows
            start += rows

    def _run(self, chunks: list[Chunk], tasks: list[RowTask]) -> list[int]:
        started_ns = perf_counter_ns()
        microbatch = Microbatch(self._model_id, _EPOCH, 0, tuple(chunks))
        logits = self._runner.run_to_sample(microbatch)
        rows = self._runner.finish(logits, SamplingInputs(_EPOCH, 0, tuple(tasks)))
        if len(chunks[0].tokens) > 1:
            timing = StageTiming(0, perf_counter_ns() - started_ns, 0, microbatch.rows)
            self._times.prefill.learn(microbatch.rows, (timing,))
        failure = next((row.failure for row in rows if row.failure is not None), None)
        if failure is not None:
            raise LlamaclustError(f"the model does not run: {failure}")
        return [row.token for row in rows]

    def _task(self, position: int) -> SampleTask:
        return SampleTask(SamplingParams(), seed=0, choice=0, position=position)
