"""A LLaMA-shaped model of which each member of a group computes some output rows of every product, as a plan in parts:
between two parts, the members exchange what they have computed. All sums are those of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, sqrt

import numpy as np
from numpy.typing import NDArray
from shape import Shape, tensors

from llamaclust.core.errors import UsageError
from llamaclust.kernels._native import PackedMatrix, Plan
from llamaclust.model.architectures.positions import rope_table
from llamaclust.model.hyperparameters import RopeParameters, RopeScaling
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.model.quant_types import ActivationFormat, QuantType

CONTEXT = 512
SEED = 1
_EPSILON, _ROPE_BASE = 1e-5, 10000.0  # of `shape.metadata`
_TILE_ROWS = 16
_FORMATS = (ActivationFormat.F32, ActivationFormat.Q8_32, ActivationFormat.Q8_256)  # in the native module's order
_SEGMENTS = {ActivationFormat.F32: 0, ActivationFormat.Q8_32: 32, ActivationFormat.Q8_256: 256}
_KV_F16 = 0

DIVIDED = {
    0: (),
    1: ("ffn", "head"),
    2: ("ffn", "down", "head"),
    3: ("attention", "ffn", "down", "head"),
    4: ("attention", "output", "ffn", "down", "head"),
}
"""What the members divide at so many gathers a layer; each of them computes the rest as a whole."""
_MATRICES = {
    "attn_q": "attention",
    "attn_k": "attention",
    "attn_v": "attention",
    "attn_output": "output",
    "ffn_gate": "ffn",
    "ffn_up": "ffn",
    "ffn_down": "down",
    "output": "head",
}

Borders = tuple[int, ...]


def borders(size: int, unit: int, shares: Sequence[float], what: str) -> Borders:
    """Where the members' portions of `size` begin and end, in whole units. UsageError where one would be empty."""
    units, sums = size // unit, np.cumsum([0, *shares])
    found = [round(units * share / sums[-1]) * unit for share in sums]
    if size % unit or any(begin == end for begin, end in pairwise(found)):
        raise UsageError(f"{what}: {size / unit:g} pieces cannot be divided by the shares {[*shares]}")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Cut:
    """What each member computes of a model."""

    shape: Shape
    quant_type: QuantType
    shares: tuple[float, ...]
    gathers: int  # a layer; 0: one member computes all

    @property
    def segment(self) -> int:
        """Columns of activations with one scale; 0: none have scales."""
        activation = self.quant_type.info.activation
        assert activation is not None
        return _SEGMENTS[activation]

    def columns(self, what: str) -> Borders | None:
        """Borders of the members' columns of what `DIVIDED` names; None where every member has all."""
        if what not in DIVIDED[self.gathers]:
            return None
        shape = self.shape
        if what == "attention":
            head_columns = shape.hidden // shape.kv_heads
            heads = max(1, self.segment // gcd(self.segment, head_columns))
            return borders(shape.hidden, heads * head_columns, self.shares, "KV heads")
        if what == "ffn":
            return borders(shape.ffn, self.segment or _TILE_ROWS, self.shares, "feed-forward channels")
        return borders(shape.vocabulary if what == "head" else shape.hidden, _TILE_ROWS, self.shares, what)

    def check(self) -> None:
        """UsageError where the model cannot be divided so."""
        for what in DIVIDED[self.gathers]:
            self.columns(what)

    def rows(self, tensor: str, rows: int, member: int) -> range:
        """Rows of a matrix that a member computes."""
        what = _MATRICES.get(tensor.removesuffix(".weight").rpartition(".")[2], "")
        columns = self.columns(what)
        if columns is None:
            return range(rows)
        whole = columns[-1]  # of keys and values it is more than they have
        return range(columns[member] * rows // whole, columns[member + 1] * rows // whole)


class Weights:
    """A member's weights, packed; random as those of `shape.py --alike`."""

    def __init__(self, cut: Cut, member: int) -> None:
        self.matrices: dict[str, PackedMatrix] = {}
        self.vectors: dict[str, NDArray[np.float32]] = {}
        self.rows: dict[str, int] = {}
        for source in tensors(cut.shape, cut.quant_type, SEED, alike=True):
            data = source.produce()
            assert isinstance(data, memoryview)
            if len(source.shape) == 1:
                self.vectors[source.name] = np.frombuffer(data, np.float32)
                continue
            rows, (count, columns) = cut.rows(source.name, source.shape[0], member), source.shape
            row_bytes = source.n_bytes // count
            matrix = PackedMatrix(source.quant_type, len(rows), columns)
            matrix.pack_rows(0, np.frombuffer(data, np.uint8)[rows.start * row_bytes : rows.stop * row_bytes])
            self.matrices[source.name], self.rows[source.name] = matrix, len(rows)

    @property
    def n_bytes(self) -> int:
        return sum(matrix.bytes for matrix in self.matrices.values())


@dataclass(frozen=True, slots=True)
class Gather:
    """What follows a part: buffers with a member's own columns and for the whole row. `segment`: the next product
    quantizes so many columns together, 0: it is a sum."""

    own: int
    whole: int
    columns: Borders
    segment: int


class DividedPlan:
    """A member's plan for one row at a time. `gathers` has what follows each part; the last part of all is the norm
    before the logits and those, which also stand alone where nothing is divided."""

    def __init__(self, cut: Cut, weights: Weights) -> None:
        self.plan = Plan(1, 1, 1, CONTEXT, CONTEXT // KV_BLOCK_TOKENS)
        self.gathers: list[Gather | None] = []
        self._cut, self._weights = cut, weights
        self._buffers: dict[tuple[str, int, bool], int] = {}
        rope = RopeParameters(cut.shape.head_dim, _ROPE_BASE, RopeScaling.NONE, 1.0, cut.shape.context, 1.0, 1.0, 32, 1)
        table = rope_table(rope)
        self._rotation = self.plan.add_rotation(list(table.frequencies), table.scale), False
        self.plan.begin_part()
        self._hidden = self._buffer("hidden", cut.shape.hidden, private=True)
        self.plan.embed(weights.matrices["token_embd.weight"], self._hidden)
        for layer in range(cut.shape.layers):
            self._attention(f"blk.{layer}")
            self._feed_forward(f"blk.{layer}")
        self._begin_part(None)
        (own,) = self._products(self._norm("output_norm"), "output")
        self.logits = self._gathered("head", own, 0, is_last=True)
        self.plan.set_result(self.logits)

    def _attention(self, layer: str) -> None:
        shape = self._cut.shape
        q, k, v = self._products(self._norm(f"{layer}.attn_norm"), *(f"{layer}.attn_{name}" for name in "qkv"))
        width = self._weights.rows[f"{layer}.attn_q.weight"]
        heads, kv_heads = width // shape.head_dim, width // (shape.hidden // shape.kv_heads)
        own = self._buffer("attended", width)
        memory, rotation = self.plan.add_kv_layer(kv_heads, shape.head_dim, _KV_F16), self._rotation
        dims, scale = (shape.head_dim, shape.head_dim), 1 / sqrt(shape.head_dim)
        self.plan.attend(
            q, (k, v), own, memory, heads, kv_heads, dims, scale, None, (), None, rotation, rotation, True, None
        )  # fmt: skip
        attended = self._gathered("attention", own, self._cut.segment)
        (projected,) = self._products(attended, f"{layer}.attn_output")
        self._add(self._gathered("output", projected, 0))

    def _feed_forward(self, layer: str) -> None:
        gate, up = self._products(self._norm(f"{layer}.ffn_norm"), f"{layer}.ffn_gate", f"{layer}.ffn_up")
        width = self._weights.rows[f"{layer}.ffn_up.weight"]
        inner = self._buffer("inner", width, private=True)
        self.plan.elementwise("silu_mul", gate, up, inner, 0)
        if self._cut.columns("ffn") is not None:
            own = self._buffer("own inner", width)
            self.plan.write_result(inner, own)
            inner = self._gathered("ffn", own, self._cut.segment)
        (down,) = self._products(inner, f"{layer}.ffn_down")
        self._add(self._gathered("down", down, 0))

    def _buffer(self, name: str, width: int, *, private: bool = False) -> int:
        key = name, width, private
        if key not in self._buffers:
            self._buffers[key] = self.plan.add_buffer(width, 1, private, False)
        return self._buffers[key]

    def _norm(self, name: str) -> int:
        normed = self._buffer("normed", self._cut.shape.hidden, private=True)
        self.plan.rms_norm(self._hidden, normed, self._weights.vectors[f"{name}.weight"], _EPSILON)
        return normed

    def _products(self, x: int, *names: str) -> list[int]:
        activation = self._cut.quant_type.info.activation
        assert activation is not None
        self.plan.quantize(x, 0, _FORMATS.index(activation))
        tensors = [f"{name}.weight" for name in names]
        out = [self._buffer(name.rpartition(".")[2], self._weights.rows[f"{name}.weight"]) for name in names]
        matrices = [self._weights.matrices[tensor] for tensor in tensors]
        self.plan.multiply([(matrix, None, own, 0) for matrix, own in zip(matrices, out, strict=True)])
        return out

    def _add(self, x: int) -> None:
        self.plan.elementwise("add", self._hidden, x, self._hidden, 0)

    def _gathered(self, what: str, own: int, segment: int, *, is_last: bool = False) -> int:
        """The buffer with the whole row, which the next part reads."""
        columns = self._cut.columns(what)
        gather = None
        if columns is not None:
            gather = Gather(own, self._buffer(f"whole {what}", columns[-1]), columns, segment)
        if is_last:
            self.gathers.append(gather)
        elif gather is not None:
            self._begin_part(gather)
        return own if gather is None else gather.whole

    def _begin_part(self, gather: Gather | None) -> None:
        self.gathers.append(gather)
        self.plan.begin_part()
