"""Runs attention steps on a device, with sequences divided into any batches, and compares them with the CPU backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cuda.executor.plan import block_bytes
from llamaclust.kernels.cuda.launches.attention import (
    NO_NORM,
    NO_ROTATION,
    AttentionBuffers,
    AttentionLaunches,
    HeadNorm,
    HeadTransform,
    Rotation,
    room_of,
)
from llamaclust.kernels.cuda.launches.elementwise import rotation
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import Inputs, RowCount
from llamaclust.kernels.cuda.runtime.device import LEAST_SHARED_BYTES, NULL
from llamaclust.kernels.reference.attention import seen_by
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import KV_BLOCK_TOKENS, Attention, Buffer, RmsNorm, Rope, Slice
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import batch_of
from support.arithmetic.matmul_cases import check_equal_bits
from support.arithmetic.single_steps import Weight, program_of
from support.cuda.launching import Bench

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

LIMITS = StageLimits(max_batch_tokens=1600, max_outputs=1, max_sequences=8, max_context_tokens=2048, kv_blocks=300)
SMALL, LARGE = LaunchLimits(2, LEAST_SHARED_BYTES, (7, 5)), LaunchLimits(3, 200 << 10, (9, 0))
NO_SLOPES = np.uint64(0)
UNUSED_ROWS = 3
"""Padding rows of each launch."""


def attention(
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_type: KvType = KvType.F16,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: tuple[float, ...] | None = None,
    sinks: str | None = None,
    chunked: bool = False,
) -> Attention:
    q, out = (Buffer(name, heads * head_dim) for name in ("q", "out"))
    k, v = (Buffer(name, kv_heads * head_dim) for name in ("k", "v"))
    scale = float(np.float32(head_dim**-0.5))
    figures = heads, kv_heads, head_dim, scale, kv_type, window, soft_cap, slopes
    return Attention(q, k, v, out, 1, *figures, sinks=sinks, chunked=chunked)


def latent(heads: int, key: int, value: int, kv_type: KvType = KvType.F16) -> Attention:
    """Builds attention with keys of `key` channels, the first `value` of which are values."""
    q, k, out = Buffer("q", heads * key), Buffer("k", key), Buffer("out", heads * value)
    return Attention(q, k, None, out, 1, heads, 1, key, float(np.float32(key**-0.5)), kv_type)


def sinks_of(step: Attention) -> Float32:
    """Returns a sink per head, from far below the scores to above them."""
    return np.linspace(-30, 8, step.heads, dtype=np.float32)


def norm_weight(norm: RmsNorm) -> Float32:
    """Draws a norm's weights, seeded by its name."""
    return np.random.default_rng(sum(str(norm.weight).encode())).uniform(0.5, 1.5, norm.width).astype(np.float32)


@dataclass(frozen=True)
class Told:
    """A sequence: rows of queries, keys and values side by side, its block table, and the expected output."""

    rows: Float32
    table: tuple[int, ...]
    wanted: Float32


HeadStep = RmsNorm | Rope
"""A step on queries or keys in place, before attention."""


def by_the_cpu(folder: Path, step: Attention, rows: Float32, before: Sequence[HeadStep] = ()) -> Float32:
    """Returns the CPU backend's attention output of one whole sequence, after the steps `before`."""
    parts = step.reads
    hidden = Buffer("x", sum(part.width for part in parts))
    starts = np.cumsum([0, *(part.width for part in parts)]).tolist()
    copies = [Slice(hidden, part, start) for part, start in zip(parts, starts, strict=False)]
    weights: dict[str, Weight] = {}
    if step.sinks is not None:
        weights[step.sinks] = Weight(sinks_of(step))
    weights |= {str(norm.weight): Weight(norm_weight(norm)) for norm in before if isinstance(norm, RmsNorm)}
    path = folder / "parts.gguf"
    write_gguf(path, {}, [weight.source(name) for name, weight in weights.items()])
    stage = all_threads(2).load(
        program_of(hidden, step.out, *copies, *before, step), dict(open_model(path).tensors), LIMITS, lambda _: None
    )
    blocks = range(-(-len(rows) // KV_BLOCK_TOKENS))
    found = stage.run(batch_of([([0] * len(rows), range(len(rows)), blocks)], outputs=[]), rows).copy()
    stage.close()
    return found


def sequences_of(
    folder: Path,
    step: Attention,
    lengths: Iterable[int],
    generator: np.random.Generator,
    before: Sequence[HeadStep] = (),
) -> list[Told]:
    width = sum(part.width for part in step.reads)
    free = iter(generator.permutation(LIMITS.kv_blocks).tolist())
    told = []
    for length in lengths:
        rows = generator.standard_normal((length, width), np.float32)
        rows[:, : step.q.width] *= np.float32(2)  # so that softmax weights differ
        table = tuple(next(free) for _ in range(-(-length // KV_BLOCK_TOKENS)))
        told.append(Told(rows, table, by_the_cpu(folder, step, rows, before)))
    return told


def in_parts(step: Attention, queries: int, rows: int) -> LaunchLimits:
    """Returns limits of a GPU on which decode divides heads into parts of `queries` queries."""
    parts = step.kv_heads * -(-step.heads // step.kv_heads // queries)
    return replace(LARGE, sms=2 * (rows + UNUSED_ROWS) * parts)


class Attender:
    """An attention step with KV memory on a device. Memory holds NaN at first; `before` are preceding steps that its
    kernels include."""

    def __init__(
        self,
        bench: Bench,
        step: Attention,
        gpu: LaunchLimits = SMALL,
        slots: int | None = None,
        before: Sequence[HeadStep] = (),
    ) -> None:
        self.bench, self.step, self.gpu = bench, step, gpu
        room = room_of((step,), LIMITS.max_batch_tokens, LIMITS.max_context_tokens)
        self.room = room if slots is None else replace(room, slots=slots)
        self.kv = bench.room(block_bytes(step) * LIMITS.kv_blocks)
        self.plan = bench.room(self.room.plan_bytes)
        self.partials = bench.room(max(16, self.room.partial_bytes(step)))
        self.slopes = None if step.slopes is None else bench.put(np.array(step.slopes, np.float32))
        self.sinks = NULL if step.sinks is None else bench.put(sinks_of(step)).at()
        self.rope = next((one for one in before if isinstance(one, Rope)), None)
        self.norms = {
            one.x: HeadNorm(bench.put(norm_weight(one)).at(), one.epsilon) for one in before if isinstance(one, RmsNorm)
        }
        self.quantized: dict[str, np.uint64] = {}  # addresses of quantized results, by name in AttentionBuffers
        self.launched: set[str] = set()

    def run(self, batch: Batch, rows: Float32, *, store_only: bool = False, one_row_each: bool = False) -> Float32:
        """Returns the attention output [rows, heads * head_dim]; launches have UNUSED_ROWS more rows."""
        step, put, unused = self.step, self.bench.put, UNUSED_ROWS
        parts = np.split(rows, np.cumsum([part.width for part in step.reads])[:-1], axis=1)
        padded = (np.concatenate([part, np.full((unused, part.shape[1]), np.nan, np.float32)]) for part in parts)
        q, k, v = (*(put(part).at() for part in padded), NULL)[:3]
        out = self.bench.room(4 * (len(rows) + unused) * step.out.width)
        header = np.array([batch.rows, len(batch.sequence_starts) - 1, 0], np.int32)
        arrays = (batch.positions, batch.sequence_starts, batch.table_starts)
        positions, starts, table_starts = (put(array).at() for array in arrays)
        tables = put(batch.block_tables if batch.window_tables is None else batch.window_tables).at()
        inputs = Inputs(put(header).at(), NULL, NULL, positions, starts, table_starts, NULL, tables, tables)
        slopes = NO_SLOPES if self.slopes is None else self.slopes.at()
        places = AttentionBuffers(
            q,
            k,
            v,
            out.at(),
            tables,
            self.kv.at(),
            slopes,
            self.plan.at(),
            self.partials.at(),
            self.sinks,
            by_32=self.quantized.get("by_32", NULL),
            by_256=self.quantized.get("by_256", NULL),
        )
        norms = (self.norms.get(part, NO_NORM) for part in (step.q, step.k))
        rotation = NO_ROTATION if self.rope is None else self._rotation(self.rope, inputs, len(rows) + unused)
        places = replace(places, transform=HeadTransform(rotation, *norms))
        made = AttentionLaunches(self.gpu, self.room, inputs, len(rows) + unused, LIMITS.max_sequences, one_row_each)
        launches = (made.plan(step, self.plan.at()), *made.step(step, places))
        for launch in launches[: 2 if store_only else None]:
            self.bench.device.launch(launch)
            self.launched.add(launch.kernel)
        return self.bench.get(out, (len(rows) + unused, step.out.width))[: len(rows)]

    @property
    def slices(self) -> int:
        """The number of slices into which kernels for few queries divided the value channels of the last batch."""
        return int(self.bench.get(self.plan, 3, np.int32)[2])

    def _rotation(self, rope: Rope, inputs: Inputs, rows: int) -> Rotation:
        table, pairs = rope.table, len(rope.table.frequencies)
        angles, frequencies = self.bench.room(8 * rows * pairs), self.bench.put(np.array(table.frequencies))
        count = RowCount(rows, inputs.rows)
        self.bench.device.launch(rotation(table, inputs.positions, frequencies.at(), angles.at(), count))
        return Rotation(angles.at(), pairs, rope.style)

    def fill(self, told: Told, rows: int) -> None:
        """Stores keys and values of the sequence's first `rows` rows in KV memory."""
        if rows:
            self.run(batch_of([([0] * rows, range(rows), told.table)]), told.rows[:rows], store_only=True)

    def check(self, parts: Sequence[tuple[Told, range]], *, one_row_each: bool = False) -> None:
        """Checks that one batch of rows has the CPU's bits; earlier rows of its sequences must be stored."""
        batch = windowed(batch_of([([0] * len(r), r, told.table) for told, r in parts]), parts, self.step)
        rows = np.concatenate([told.rows[r.start : r.stop] for told, r in parts])
        wanted = np.concatenate([told.wanted[r.start : r.stop] for told, r in parts])
        found = self.run(batch, rows, one_row_each=one_row_each)
        assert np.isfinite(wanted).all()
        assert len(np.unique(wanted)) > wanted.size // 4
        check_equal_bits(found, wanted, self.step)


def windowed(batch: Batch, parts: Sequence[tuple[Told, range]], step: Attention) -> Batch:
    """Returns the batch with window tables, in which -1 stands for blocks behind the window."""
    if step.window is None:
        return batch
    tables = []
    for told, rows in parts:
        gone = seen_by(step, rows.start, rows.stop)[0] // KV_BLOCK_TOKENS
        tables += [-1] * gone + list(told.table[gone:])
    return Batch(
        batch.tokens,
        batch.positions,
        batch.sequence_starts,
        batch.table_starts,
        batch.block_tables,
        batch.output_rows,
        np.array(tables, np.int32),
    )
