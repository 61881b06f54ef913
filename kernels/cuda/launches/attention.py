"""Launches of attention. A plan divides rows into tiles, and the positions that a tile sees into spans. Each layer
stores its keys and values, computes its tiles, and merges the partial results of spans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.kernels.cuda.launches.gpu_properties import LaunchLimits
from llamaclust.kernels.cuda.launches.inputs import Inputs
from llamaclust.kernels.cuda.runtime.device import NULL, PLAIN_SHARED_BYTES, Launch, Scalar
from llamaclust.model.kv_type import KV_GROUP_CHANNELS, KvType
from llamaclust.model.program import KV_BLOCK_TOKENS, SPAN_TOKENS, Attention, Program
from llamaclust.model.steps.options import RopeStyle

MAX_PARTIAL_BYTES = 64 << 20
"""The memory limit for partial results of spans. Tiles are divided into spans only if all partial results fit."""

_MAX_HEAD_DIM, _MAX_LATENT_DIM = 512, 576
_FEW_QUERIES, _PART_QUERIES, _FEW_LATENT_QUERIES = (1, 2, 4, 8, 16), (4, 8, 16), (4, 8)
_MANY_QUERIES = {KvType.F16: (32, 16), KvType.Q8_0: (16,), KvType.INT8: (16,)}
_WEIGHT_TOKENS = 64
_SCORE_STRIDE = SPAN_TOKENS + 4
_STATIC_BYTES = 1024
# Number of channels of values that a thread block computes.
_SLICE_CHANNELS, _LATENT_SLICE_CHANNELS = 32, 128
_MERGED_CHANNELS, _MERGED_HEAD_DIMS, _MOST_MERGED_HEADS = 256, (32, 64, 128, 256), 16
_MERGER_FLOATS = 4 * 256 + 3 * _MOST_MERGED_HEADS
_NO_WINDOW = (1 << 31) - 1
_CAUSAL, _GROUP, _SEQUENCE = range(3)


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that a stage's attention steps share. It has `slots` partial results, one per row and span."""

    max_rows: int
    slots: int
    max_context_tokens: int
    kv_heads: int

    @property
    def plan_bytes(self) -> int:
        return 4 * (8 + (4 + self.kv_heads) * self.max_rows + 2 * 8 * (self.max_rows + self.slots))

    def partial_bytes(self, step: Attention) -> int:
        return self.slots * _slot_bytes(step)


@dataclass(frozen=True, slots=True)
class Rotation:
    angles: np.uint64
    pairs: int
    style: RopeStyle


@dataclass(frozen=True, slots=True)
class HeadNorm:
    weight: np.uint64
    epsilon: float


NO_ROTATION, NO_NORM = Rotation(NULL, 0, RopeStyle.NORM), HeadNorm(NULL, 0.0)


@dataclass(frozen=True, slots=True)
class HeadTransform:
    """The transform of heads before attention: a norm, and then a rotation. Queries are transformed in place."""

    rotation: Rotation = NO_ROTATION
    of_queries: HeadNorm = NO_NORM
    of_keys: HeadNorm = NO_NORM

    @property
    def args(self) -> tuple[Scalar, ...]:
        turn = self.rotation
        rotation = turn.angles, np.int32(turn.pairs), np.int32(turn.style is RopeStyle.NEOX)
        q, k = self.of_queries, self.of_keys
        return *rotation, q.weight, np.float32(q.epsilon), k.weight, np.float32(k.epsilon)


NO_TRANSFORM = HeadTransform()


@dataclass(frozen=True, slots=True)
class AttentionBuffers:
    """The GPU addresses that an attention step uses. Steps with equal `likeness` share one `plan`."""

    q: np.uint64
    k: np.uint64
    v: np.uint64
    out: np.uint64
    tables: np.uint64
    kv: np.uint64
    slopes: np.uint64
    plan: np.uint64
    partials: np.uint64
    sinks: np.uint64 = NULL  # float32 [heads], or 0 without sinks.
    transform: HeadTransform = NO_TRANSFORM
    by_32: np.uint64 = NULL  # If `can_quantize`, quantized rows are written here instead of to `out`.
    by_256: np.uint64 = NULL


def _slot_bytes(step: Attention) -> int:
    return 4 * step.heads * (step.value_dim + 2)


def _piece_bytes(step: Attention) -> int:
    return KV_BLOCK_TOKENS * step.kv_token_bytes // step.kv_heads


def _spans(step: Attention, max_context_tokens: int) -> int:
    spans = -(-max_context_tokens // SPAN_TOKENS)
    return spans if step.window is None else min(spans, max(step.window - 2, 0) // SPAN_TOKENS + 2)


def room_of(steps: tuple[Attention, ...], max_rows: int, max_context_tokens: int) -> Room:
    slots = (min(max_rows * _spans(step, max_context_tokens), MAX_PARTIAL_BYTES // _slot_bytes(step)) for step in steps)
    kv_heads = max((step.kv_heads for step in steps), default=0)
    return Room(max_rows, max(slots, default=0), max_context_tokens, kv_heads)


def _group(step: Attention) -> int:
    return step.heads // step.kv_heads


def _many_queries(step: Attention, gpu: LaunchLimits) -> int:
    """Returns the number of queries in the largest tile that fits shared memory. Raises ModelFileError if none fits."""
    for queries in _MANY_QUERIES[step.kv_type]:
        if (needed := many_shared_bytes(step, queries) + _STATIC_BYTES) <= gpu.shared_bytes:
            return queries
    found = f"{needed >> 10} KiB of shared memory in a block, but this GPU has {gpu.shared_bytes >> 10} KiB"
    instead = "use a GPU of compute capability 7.0 or higher, or set 'device: cpu'"
    raise ModelFileError(f"heads of {step.head_dim} channels need {found}; {instead}")


def _few_queries(step: Attention) -> int:
    """Returns the number of queries in a thread block of the kernel `few`, or 0 if `few` cannot compute the step."""
    return 0 if step.v is None else next((queries for queries in _FEW_QUERIES if queries >= _group(step)), 0)


def _window(step: Attention) -> tuple[int, int]:
    return step.window or _NO_WINDOW, int(step.chunked)


def _parts(step: Attention, queries: int) -> int:
    return -(-_group(step) // queries)


def attention_steps(program: Program) -> tuple[Attention, ...]:
    return tuple(step for step in program.steps if isinstance(step, Attention))


def check_attention(program: Program) -> None:
    """Raises ModelFileError if heads are too large for the GPU kernels. The CPU backend checks everything else."""
    for step in attention_steps(program):
        at = f"layers {program.start} to {program.end} cannot be computed"
        if step.v is None and (step.head_dim > _MAX_LATENT_DIM or step.value_dim > _MAX_HEAD_DIM):
            found, most = f"{step.head_dim} and {step.value_dim}", f"{_MAX_LATENT_DIM} and {_MAX_HEAD_DIM}"
            raise ModelFileError(f"{at}: keys and values have {found} channels; GPUs support at most {most}")
        if step.v is not None and step.head_dim > _MAX_HEAD_DIM:
            raise ModelFileError(f"{at}: heads have {step.head_dim} channels; GPUs support at most {_MAX_HEAD_DIM}")


def tile_rows(step: Attention, gpu: LaunchLimits) -> int:
    return max(1, _many_queries(step, gpu) // _group(step))


def likeness(step: Attention) -> tuple[object, ...]:
    """Returns the properties that decide a step's tiles. Steps with equal properties can share one plan of tiles."""
    seen = step.window, step.chunked, step.causal, step.grouped
    return step.heads, step.kv_heads, step.head_dim, step.kv_type, seen, step.v is None


def _stage_channels(step: Attention) -> int:
    return 64 if step.head_dim <= 64 else 128


def _stage_floats(step: Attention, blocks: int, queries: int, channels: int) -> int:
    """Returns the number of floats that values and their scales take in shared memory."""
    if step.v is None:
        return 0
    if step.kv_type is KvType.INT8:
        groups = channels // KV_GROUP_CHANNELS
        return _WEIGHT_TOKENS * (channels // 4 + groups) + queries * groups * (1 + _WEIGHT_TOKENS // 4)
    scales = channels // KV_GROUP_CHANNELS if step.kv_type is KvType.Q8_0 else 0
    return blocks * 16 * (channels + scales)


def value_slices(step: Attention) -> int:
    return -(-step.value_dim // (_SLICE_CHANNELS if step.v is not None else _LATENT_SLICE_CHANNELS))


def few_shared_bytes(step: Attention, queries: int) -> int:
    scores = max(queries * max(_SCORE_STRIDE, 8 * -(-step.head_dim // 8)), _MERGER_FLOATS)
    channels = _stage_channels(step) if step.kv_type is KvType.INT8 else 128
    staged = _stage_floats(step, 2 if queries < 16 else 1, queries, channels)
    fresh = max(_fresh_floats(step), _merged_floats(step)) if brings_own(step) else 0
    return 4 * (scores + max(staged, fresh))


def _fresh_floats(step: Attention) -> int:
    return (_group(step) + 3) * step.head_dim


def _merged_floats(step: Attention) -> int:
    return max(_quantized_together(step), 1) * _group(step) * step.value_dim


def brings_own(step: Attention) -> bool:
    """True if the kernel `few` can also store the row's own key and value, which saves a separate launch."""
    queries = _few_queries(step)
    fits = 4 * (queries * _SCORE_STRIDE + _fresh_floats(step)) + _STATIC_BYTES <= PLAIN_SHARED_BYTES
    return queries > 0 and not step.shares_kv and fits


def many_shared_bytes(step: Attention, queries: int) -> int:
    if step.kv_type is KvType.F16:
        staged = 8 * (-(-step.head_dim // 8) * queries + SPAN_TOKENS)
    else:
        groups = -(-step.head_dim // KV_GROUP_CHANNELS)
        staged = queries * (2 * (8 * groups + 4) + groups)
    return 4 * (max(queries * _SCORE_STRIDE, staged) + _stage_floats(step, 1, queries, _stage_channels(step)))


def _merges(step: Attention, room: Room) -> bool:
    return _spans(step, room.max_context_tokens) > 1 and room.slots > 0


def can_quantize(step: Attention, room: Room, *, decode: bool = False) -> bool:
    """True if attention can also quantize its result. A segment has 256 channels, so a head's width must divide 256."""
    fits = step.value_dim in _MERGED_HEAD_DIMS and step.out.width % _MERGED_CHANNELS == 0
    return fits and (_merges(step, room) or (decode and brings_own(step) and _quantized_together(step) > 0))


def _quantized_together(step: Attention) -> int:
    """Returns the smallest number of KV heads whose results fill whole segments, or 0 if that is too many to merge."""
    own = _group(step) * step.value_dim
    kv_heads = lcm(own, _MERGED_CHANNELS) // own
    return kv_heads if kv_heads * _group(step) <= _MOST_MERGED_HEADS else 0


@dataclass(frozen=True, slots=True)
class AttentionLaunches:
    """The launches of attention for microbatches of up to `rows` rows. If `decode`, no two rows belong to the same
    sequence. If `grouped`, rows may see later positions, and all tiles have many queries."""

    gpu: LaunchLimits
    room: Room
    inputs: Inputs
    rows: int
    max_sequences: int
    decode: bool = False
    grouped: bool = False

    def plan(self, step: Attention, plan: np.uint64) -> Launch:
        """Returns the launch that writes tiles (groups of rows) and spans (ranges of positions) to `plan`."""
        inputs, room, few = self.inputs, self.room, self._few(step)
        split_below = -(-2 * self.gpu.sms // (step.kv_heads * _parts(step, self._many(step))))
        places = 2 * self.gpu.sms // (step.kv_heads * _parts(step, few)) if few else 0
        slices = value_slices(step), places, step.kv_heads
        tiles = (tile_rows(step, self.gpu), max(1, few // _group(step)) if few else 0, *_window(step))
        arrays = (inputs.rows, inputs.positions, inputs.sequence_starts, inputs.table_starts)
        figures = map(np.int32, (*tiles, room.max_rows, room.slots, split_below, *slices))
        kernel = "attention.grouped.plan" if self.grouped else "attention.rows.plan"
        return Launch(kernel, (1, 1, 1), (256, 1, 1), (*arrays, *figures, plan, *self._seen(step)))

    def _seen(self, step: Attention) -> tuple[Scalar, ...]:
        sees = _CAUSAL if step.causal else _GROUP if step.grouped else _SEQUENCE
        return (self.inputs.seen, np.int32(sees)) if self.grouped else ()

    def _few(self, step: Attention) -> int:
        """Returns the number of queries in a thread block of the kernel `few`, or 0 if that kernel does not run."""
        if self.grouped:
            return 0
        if queries := _few_queries(step):
            # A thread block has the queries of several rows.
            return queries if self.decode else max(queries, _PART_QUERIES[0])
        if not self.decode:
            return 0
        sizes = _FEW_LATENT_QUERIES if step.v is None else _PART_QUERIES
        return next((queries for queries in sizes if self._have_room(step, queries)), 0)

    def _many(self, step: Attention) -> int:
        most, group = _many_queries(step, self.gpu), _group(step)
        sizes = (queries for queries in reversed(_MANY_QUERIES[step.kv_type]) if queries <= most)
        fewer = (queries for queries in sizes if queries >= group or self._have_room(step, queries))
        return next(fewer, most) if self.decode else most

    def _have_room(self, step: Attention, queries: int) -> bool:
        """True if the GPU has two multiprocessors for each thread block of `queries` queries."""
        return 2 * self.rows * step.kv_heads * _parts(step, queries) <= self.gpu.sms

    def step(self, step: Attention, at: AttentionBuffers) -> Iterator[Launch]:
        few, spans, rows, sms = self._few(step), _spans(step, self.room.max_context_tokens), self.rows, self.gpu.sms
        fresh = self.decode and brings_own(step)
        together = self._together(step, at) if fresh else 0
        if not (step.shares_kv or fresh):
            yield self._store(step, at)
        if few:
            heads = step.kv_heads * _parts(step, few)
            blocks = min(rows * spans * value_slices(step), -(-4 * sms // heads))
            kernel, grid = ("few", (heads, blocks, 1)) if step.v is not None else ("latent", (blocks, heads, 1))
            further = self._fresh(at, fresh, together) if step.v is not None else ()
            yield self._attend(
                f"{kernel}.few_{step.kv_type}_{few}", grid, few_shared_bytes(step, few), step, at, further
            )
        if not (few and self.decode):
            many = self._many(step)
            heads = step.kv_heads * _parts(step, many)
            tiles = min(rows, rows // tile_rows(step, self.gpu) + self.max_sequences)
            grid = max(tiles, min(rows * spans, -(-2 * sms // heads))), heads, 1
            module = "grouped" if self.grouped else "tile"
            kernel = f"{module}.tile" if step.v is not None else "latent.latent"
            shared_bytes = many_shared_bytes(step, many)
            yield self._attend(f"{kernel}_{step.kv_type}_{many}", grid, shared_bytes, step, at, self._seen(step))
        if _merges(step, self.room) and together == 0:
            yield self._merge(step, at)

    def can_quantize(self, step: Attention) -> bool:
        return can_quantize(step, self.room, decode=self.decode)

    def _together(self, step: Attention, at: AttentionBuffers) -> int:
        return _quantized_together(step) if at.by_32 != at.by_256 else int(_merges(step, self.room))

    def _fresh(self, at: AttentionBuffers, fresh: bool, together: int) -> tuple[Scalar, ...]:
        places = (at.k, at.v) if fresh else (NULL, NULL)
        outs = (at.by_32, at.by_256) if together else (NULL, NULL)
        return *places, *at.transform.args, np.int32(together), *outs

    def _plan_args(self, at: AttentionBuffers) -> tuple[Scalar, ...]:
        return at.plan, np.int32(self.room.max_rows), np.int32(self.room.slots)

    def _store(self, step: Attention, at: AttentionBuffers) -> Launch:
        sizes = map(np.int32, (step.heads, step.kv_heads, step.head_dim, _piece_bytes(step)))
        rows = self.inputs.rows, self.inputs.positions, *self._plan_args(at)
        args = (*rows, at.tables, at.q, at.k, at.v, *sizes, at.kv, *at.transform.args)
        return Launch(f"attention.rows.store_{step.kv_type}", (self.rows, step.kv_heads, 1), (128, 1, 1), args)

    def _attend(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        shared_bytes: int,
        step: Attention,
        at: AttentionBuffers,
        further: tuple[Scalar, ...] = (),
    ) -> Launch:
        sizes = step.heads, step.kv_heads, step.head_dim, step.value_dim, _piece_bytes(step)
        figures = map(np.int32, (*sizes, *_window(step)))
        scores = np.float32(step.scale), np.float32(step.soft_cap or 0.0)
        arrays = at.tables, at.q, at.kv, at.slopes, at.sinks
        args = (*self._plan_args(at), *arrays, *figures, *scores, at.partials, at.out, *further)
        return Launch(f"attention.{kernel}", grid, (256, 1, 1), args, shared_bytes)

    def _merge(self, step: Attention, at: AttentionBuffers) -> Launch:
        outs = (at.partials, at.sinks, np.int32(step.heads), np.int32(step.value_dim), at.out, at.by_32, at.by_256)
        heads = 1 if at.by_32 == at.by_256 else _MERGED_CHANNELS // step.value_dim
        args = (self.inputs.rows, *self._plan_args(at), *outs)
        return Launch("attention.rows.merge", (self.rows, step.heads // heads, 1), (128, heads, 1), args)
