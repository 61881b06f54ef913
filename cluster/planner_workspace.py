"""What a stage takes beside weights and KV memory: the sum that the CPU backend makes, from a program's widths alone.

The planner knows no backend, so the sum stands here again; a test compares the two to the byte over many shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamaclust.model.program import (
    SPAN_TOKENS,
    Attention,
    Buffer,
    MatMul,
    Moe,
    Program,
    Rope,
    RopeTable,
    SelectRows,
    Step,
)

_FLOAT_BYTES = 4
_LINE_BYTES = 64
_PAGE_BYTES = 4096
_PRIVATE_ROWS = 8  # up to so many rows, every thread has copies of its own
_PANEL_COLUMN_BYTES = 96  # of weights decoded for many rows at once
_LANES = 16
_TILE_QUERIES = 64
_SCORED_QUERIES = 8


@dataclass(frozen=True, slots=True)
class Workspace:
    """What stages at one place of a model take."""

    shared_bytes: int
    thread_bytes: int  # of each thread
    span_bytes: int = 0  # of each span of the context, where several threads share attention
    context_token_bytes: int = 0  # of each token of the context: its angles of rotation

    def bytes(self, threads: int, context_tokens: int) -> int:
        spans = -(-context_tokens // SPAN_TOKENS)
        partials = _lines(spans * self.span_bytes) if threads > 1 else 0
        shared = _rounded(self.shared_bytes + partials, _PAGE_BYTES)
        return shared + threads * self.thread_bytes + context_tokens * self.context_token_bytes


@dataclass(frozen=True, slots=True)
class ModelWorkspace:
    """Of the last stage, which has the head, and of all others."""

    inner: Workspace
    last: Workspace

    @classmethod
    def of(cls, whole: Program, max_tokens: int, max_outputs: int) -> ModelWorkspace:
        """For stages of the model whose whole program is given; a first stage takes what one in the middle does."""
        head = next(index for index, step in enumerate(whole.steps) if isinstance(step, SelectRows))
        result = _Place(Buffer("result", whole.hidden.width), shared=True)  # what others send on
        return cls(
            _workspace(whole.steps[:head], [result], max_tokens, max_outputs),
            _workspace(whole.steps, [], max_tokens, max_outputs),
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a step writes: `lines` of a buffer for each row, in memory of all threads or with copies in each."""

    buffer: Buffer
    shared: bool = False
    lines: int = 1
    outputs_only: bool = False

    @property
    def row_bytes(self) -> int:
        return self.buffer.width * self.lines * _FLOAT_BYTES


def _workspace(steps: Sequence[Step], more: Sequence[_Place], max_tokens: int, max_outputs: int) -> Workspace:
    places = {*_places(steps), *more}
    activations = max(size for step in steps for size in _activation_bytes(step))
    attentions = [step for step in steps if isinstance(step, Attention)]
    shared = sum(_lines((max_outputs if one.outputs_only else max_tokens) * one.row_bytes) for one in places)
    private = sum(_lines(_PRIVATE_ROWS * one.row_bytes) for one in places if not one.shared)
    scratch = max(_scratch_bytes(step) for step in steps)
    return Workspace(
        shared + max_tokens * activations,
        _rounded(private + _PRIVATE_ROWS * activations + _lines(scratch), _PAGE_BYTES),
        max(map(_span_bytes, attentions)),
        sum(2 * len(table.frequencies) * _FLOAT_BYTES for table in _tables(steps)),
    )


def _places(steps: Sequence[Step]) -> Iterator[_Place]:
    selected = False
    for step in steps:
        selected = selected or isinstance(step, SelectRows)
        match step:
            case Rope():
                pass  # attention rotates on the way
            case Moe():
                yield from _expert_places(step, selected)
            case _:
                yield _Place(step.out, isinstance(step, MatMul | Attention), outputs_only=selected)


def _expert_places(step: Moe, selected: bool) -> Iterator[_Place]:
    yield _Place(Buffer("router logits", step.experts), True, outputs_only=selected)
    yield _Place(Buffer("chosen experts", 2 * step.used), outputs_only=selected)
    for name in ("gate", "up"):
        yield _Place(Buffer(f"expert {name}", step.ffn_width), True, step.used, selected)
    yield _Place(Buffer("expert activated", step.ffn_width), False, step.used, selected)
    yield _Place(Buffer("expert down", step.out.width), True, step.used, selected)
    yield _Place(step.out, outputs_only=selected)


def _activation_bytes(step: Step) -> Iterator[int]:
    """Of one row of what products read, at float32: other types take less."""
    if isinstance(step, MatMul | Moe):
        yield _lines(step.x.width * _FLOAT_BYTES)
    if isinstance(step, Moe):
        yield step.used * _lines(step.ffn_width * _FLOAT_BYTES)


def _scratch_bytes(step: Step) -> int:
    """What a thread needs within the step."""
    match step:
        case MatMul():
            return step.x.width * _PANEL_COLUMN_BYTES
        case Moe():
            return max(_lines(max(step.x.width, step.ffn_width) * _PANEL_COLUMN_BYTES), step.experts * _FLOAT_BYTES)
        case Attention():
            channels = step.head_dim + _LANES
            floats = (_TILE_QUERIES + 1) * channels + _SCORED_QUERIES * SPAN_TOKENS + _TILE_QUERIES
            return (floats + 2 * _span_floats(_TILE_QUERIES, step.head_dim)) * _FLOAT_BYTES
        case _:
            return 0


def _span_bytes(step: Attention) -> int:
    """Of one span, for two sequences that decode."""
    group = step.heads // step.kv_heads
    units = step.kv_heads * -(-group // _TILE_QUERIES)
    return 2 * units * _span_floats(min(group, _TILE_QUERIES), step.head_dim) * _FLOAT_BYTES


def _span_floats(queries: int, head_dim: int) -> int:
    """Maxima, sums and outputs of that many queries over a span."""
    return 2 * (_rounded(queries, _LANES) + _LANES) + queries * _rounded(head_dim, _LANES)


def _tables(steps: Sequence[Step]) -> set[RopeTable]:
    return {step.table for step in steps if isinstance(step, Rope)}


def _lines(size_bytes: int) -> int:
    return _rounded(size_bytes, _LINE_BYTES)


def _rounded(value: int, unit: int) -> int:
    return -(-value // unit) * unit
