"""Attention over random sequences that are computed in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import available_levels
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage
from llamaclust.kernels.reference.kv import round_to_bytes
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Attention, Buffer, Program, Rope, RopeTable
from llamaclust.model.steps.options import RopeStyle
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import batch_of
from support.arithmetic.single_steps import normal, program_of, splitter

Float32 = NDArray[np.float32]


LIMITS = StageLimits(max_batch_tokens=1200, max_outputs=1, max_sequences=8, max_context_tokens=1200, kv_blocks=256)


ERRORS = {KvType.F16: 1e-8, KvType.Q8_0: 1e-6, KvType.INT8: 5e-4}
"""Largest errors against float64 attention on rounded keys and values; `int8` also rounds queries and weights."""


LEVELS = available_levels()


MAKERS: dict[str, Callable[[], CpuBackend]] = {level: partial(all_threads, 2, level) for level in LEVELS}


@dataclass(frozen=True)
class Model:
    """A model of one attention step with rotation; the hidden state is the concatenated queries, keys and values."""

    folder: Path
    heads: int
    kv_heads: int
    head_dim: int
    kv_type: KvType = KvType.F16
    window: int | None = None
    slopes: tuple[float, ...] | None = None

    @cached_property
    def program(self) -> Program:
        query, out = Buffer("q", self.heads * self.head_dim), Buffer("out", self.heads * self.head_dim)
        key, value = Buffer("k", self.kv_heads * self.head_dim), Buffer("v", self.kv_heads * self.head_dim)
        hidden = Buffer("x", query.width + 2 * key.width)
        table = RopeTable(tuple(10000.0 ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)))
        copies, _ = splitter(hidden, [query, key, value])
        return program_of(
            hidden,
            out,
            *copies,
            Rope(query, self.heads, self.head_dim, RopeStyle.NEOX, table),
            Rope(key, self.kv_heads, self.head_dim, RopeStyle.NEOX, table),
            Attention(
                query,
                key,
                value,
                out,
                1,
                self.heads,
                self.kv_heads,
                self.head_dim,
                scale=1 / self.head_dim**0.5,
                kv_type=self.kv_type,
                window=self.window,
                slopes=self.slopes,
            ),
        )

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        program = self.program
        parts = [step.out for step in program.steps[:3]]
        _, weights = splitter(program.hidden, parts)
        path = self.folder / "weights.gguf"
        write_gguf(path, {}, [weight.source(name) for name, weight in weights.items()])
        return dict(open_model(path).tensors)

    def hidden(self, rows: int, seed: int = 1) -> Float32:
        return normal(np.random.default_rng([self.heads, self.head_dim, seed]), rows, self.program.hidden.width)

    @contextmanager
    def stage(self, make: Callable[[], CpuBackend], limits: StageLimits = LIMITS) -> Iterator[CpuStage]:
        backend = make()
        stage = backend.load(self.program, self.tensors, limits, lambda done_bytes: None)
        yield stage
        stage.close()


def rows_of(positions: range, table: Sequence[int]) -> Batch:
    return batch_of([([0] * len(positions), positions, table)], outputs=[])


def run_chunks(stage: CpuStage, hidden: Float32, chunks: Iterable[range], table: Sequence[int] = range(75)) -> Float32:
    """Returns the attention of one sequence that is computed in chunks."""
    parts = [stage.run(rows_of(chunk, table), hidden[chunk.start : chunk.stop]).copy() for chunk in chunks]
    return np.concatenate(parts)


def chunks_of(total: int, size: int) -> list[range]:
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def assert_same_bits(found: Float32, wanted: Float32) -> None:
    assert np.isfinite(wanted).all()
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


def rounded(x: NDArray[np.float64], kv_type: KvType) -> NDArray[np.float64]:
    """Returns keys or values [rows, heads, channels] as the KV cache stores them."""
    if kv_type is KvType.F16:
        return x.astype(np.float16).astype(np.float64)
    return round_to_bytes(x.astype(np.float32)).values()


def in_float64(model: Model, hidden: Float32) -> NDArray[np.float64]:
    """Returns attention in float64 by its definition, on rounded keys and values."""
    step = model.program.kv_layers[0]
    heads, kv_heads, dim, rows = step.heads, step.kv_heads, step.head_dim, len(hidden)
    q, k, v = np.split(hidden.astype(np.float64), [heads * dim, (heads + kv_heads) * dim], axis=1)
    angles = np.arange(rows)[:, None] * 10000.0 ** (-2 * np.arange(dim // 2) / dim)

    def rotate(x: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        a, b = np.split(x.reshape(rows, count, dim), 2, axis=2)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=2)

    queries = rotate(q, heads)
    keys = rounded(rotate(k, kv_heads), step.kv_type).repeat(heads // kv_heads, axis=1)
    values = rounded(v.reshape(rows, kv_heads, dim), step.kv_type).repeat(heads // kv_heads, axis=1)
    scores = queries.transpose(1, 0, 2) @ keys.transpose(1, 2, 0) * step.scale  # [heads, rows, rows]
    ahead = np.arange(rows)[:, np.newaxis] - np.arange(rows)
    scores -= np.array(step.slopes or (0.0,)).reshape(-1, 1, 1) * ahead
    scores[:, (ahead < 0) | (ahead >= (step.window or rows))] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    sums: NDArray[np.float64] = (weights @ values.transpose(1, 0, 2)).transpose(1, 0, 2).reshape(rows, -1)
    return sums
