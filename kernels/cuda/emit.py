"""Steps of a program as launches: which kernels, over which buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llamaclust.kernels.cpu.fuse import Attend, FusedStep, Products, fuse, reads_of, written_by
from llamaclust.kernels.cuda import experts, products, rows
from llamaclust.kernels.cuda.device import Launch
from llamaclust.kernels.cuda.emit_attention import AttentionSteps
from llamaclust.kernels.cuda.place import NOWHERE, Place
from llamaclust.kernels.cuda.shapes import Shape
from llamaclust.model.program import (
    Add,
    AddPosition,
    Buffer,
    Embed,
    Gelu,
    LayerNorm,
    MatMul,
    Moe,
    Mul,
    RmsNorm,
    Rope,
    RopeTable,
    RowStep,
    Scale,
    SelectRows,
    SigmoidGate,
    SiluMul,
    Slice,
    SoftCap,
)
from llamaclust.model.quant_types import ActivationFormat, QuantType

_FLOAT = 4
_LEAST_PIECE = 8
"""Lines of experts that products take together, at least."""


@dataclass(slots=True)
class Emitter:
    """Of one shape, step by step."""

    place: Place
    shape: Shape
    _selected: bool = False
    _current: dict[str, np.uint64] = field(default_factory=dict)  # where a buffer's newest values are

    def launches(self) -> Iterator[Launch]:
        program = self.place.program
        if not program.is_first:
            self._out(program.hidden)
        yield from self._rotations()
        yield from AttentionSteps(self.place, self.shape).plans()
        for step in fuse(program):
            if isinstance(step, SelectRows) and self.shape.outputs == 0:
                return
            yield from self._emit(step)

    def _emit(self, step: FusedStep) -> Iterator[Launch]:
        match step:
            case Embed():
                yield self._dequantized(step.weight, self.place.inputs.tokens, self._out(step.out))
            case Products():
                yield from self._products(step.x, step.steps)
            case Attend():
                yield from self._attend(step)
            case Moe():
                yield from self._experts(step)
            case SelectRows():
                x, self._selected = self._current[step.x.name], True
                out = self._out(step.out)
                yield rows.select_rows(x, self.place.inputs.output_rows, out, step.x.width, *self._lines)
            case _:
                yield from self._row_step(step)

    @property
    def _lines(self) -> tuple[int, np.uint64]:
        """Lines of the shape, and where it stands how many there are."""
        if self._selected:
            return self.shape.outputs, self.place.inputs.outputs
        return self.shape.rows, self.place.inputs.rows

    @property
    def _room(self) -> int:
        """Lines of a buffer."""
        return self.place.limits.max_outputs if self._selected else self.place.limits.max_tokens

    def _out(self, buffer: Buffer, multiple: int = 1) -> np.uint64:
        n_bytes = _FLOAT * buffer.width * multiple * self._room
        self._current[buffer.name] = self.place.regions.at((buffer.name, self._selected), n_bytes)
        return self._current[buffer.name]

    def _weight(self, name: str) -> products.Weights:
        weight = self.place.weights[name]
        n_rows, cols = weight.shape[-2:]
        return products.Weights(weight.quant_type, n_rows, cols, weight.address)

    def _vector(self, name: str | None) -> np.uint64:
        return NOWHERE if name is None else self.place.weights[name].address

    def _dequantized(self, name: str, ids: np.uint64, out: np.uint64) -> Launch:
        return products.embed(self._weight(name), ids, *self._lines, out)

    def _quantized(
        self, x: np.uint64, width: int, types: Sequence[QuantType], multiple: int = 1
    ) -> tuple[list[Launch], list[np.uint64]]:
        """x once in each format that the types ask for, and where each type finds it."""
        launches: list[Launch] = []
        places: dict[ActivationFormat, np.uint64] = {ActivationFormat.F32: x}
        found = []
        for kind in types:
            activation = kind.info.activation
            assert activation is not None
            if activation not in places:
                most, count = self._lines
                n_bytes = products.activation_bytes(activation, self._room * multiple, width)
                out = places[activation] = self.place.regions.at(("activations", activation), n_bytes)
                launches.append(products.quantize(activation, x, width, most * multiple, count, multiple, out))
            found.append(places[activation])
        return launches, found

    def _products(self, x: Buffer, steps: Sequence[MatMul]) -> Iterator[Launch]:
        types = [self.place.weights[step.weight].quant_type for step in steps]
        launches, activations = self._quantized(self._current[x.name], x.width, types)
        yield from launches
        for step, given in zip(steps, activations, strict=True):
            out, bias = self._out(step.out), self._vector(step.bias)
            yield products.multiply(self._weight(step.weight), given, bias, *self._lines, out, self.place.card.sms)

    def _row_step(self, step: RowStep) -> Iterator[Launch]:
        x, *others = (self._current[buffer.name] for buffer in reads_of(step))
        out = x if isinstance(step, Rope) else self._out(written_by(step))
        width, lines = written_by(step).width, self._lines
        match step:
            case RmsNorm():
                weight = self._vector(step.weight)
                yield rows.rms_norm(x, weight, step.epsilon, step.heads, step.width, out, *lines)
            case LayerNorm():
                weight, bias = self._vector(step.weight), self._vector(step.bias)
                yield rows.layer_norm(x, weight, bias, step.epsilon, width, out, *lines)
            case AddPosition():
                added = self._scratch("positions", width)
                yield self._dequantized(step.weight, self.place.inputs.positions, added)
                yield rows.elementwise("add_rows", (x, added), out, width, *lines)
            case Rope():
                yield self._rotated(step, x)
            case SiluMul():
                yield rows.elementwise("silu_mul", (x, *others), out, width, *lines)
            case Gelu():
                yield rows.gelu(step.kind, x, out, width, *lines)
            case Add():
                yield rows.elementwise("add_rows", (x, *others), out, width, *lines)
            case Mul():
                yield rows.elementwise("mul_rows", (x, *others), out, width, *lines)
            case Scale():
                yield rows.elementwise("scale_rows", (x, np.float32(step.factor)), out, width, *lines)
            case SoftCap():
                yield rows.elementwise("soft_cap_rows", (x, np.float32(step.cap)), out, width, *lines)
            case Slice():
                yield rows.slice_of(x, step.x.width, step.start, out, width, *lines)
            case SigmoidGate():
                weight = self._vector(step.weight)
                yield rows.sigmoid_gate(x, step.x.width, weight, others[0], out, width, *lines)

    def _scratch(self, name: str, width: int, multiple: int = 1) -> np.uint64:
        return self.place.regions.at((name, self._selected), _FLOAT * width * multiple * self._room)

    def _rotations(self) -> Iterator[Launch]:
        """Of every table, once for all layers."""
        tables = dict.fromkeys(step.table for step in self.place.program.steps if isinstance(step, Rope))
        for table in tables:
            pairs = len(table.frequencies)
            frequencies = self.place.constant(np.array(table.frequencies, np.float64))
            yield rows.rotation(
                self.place.inputs.positions, frequencies, table.scale, pairs, self._angles(table), *self._lines
            )

    def _angles(self, table: RopeTable) -> np.uint64:
        n_bytes = _FLOAT * 2 * len(table.frequencies) * self.place.limits.max_tokens
        return self.place.regions.at(("rotation", table), n_bytes)

    def _rotated(self, step: Rope, x: np.uint64) -> Launch:
        return rows.rope(step, x, self._angles(step.table), *self._lines)

    def _attend(self, step: Attend) -> Iterator[Launch]:
        for rope in (step.rotate_q, step.rotate_k):
            if rope is not None:
                yield self._rotated(rope, self._current[rope.x.name])
        q, k, v = (self._current[buffer.name] for buffer in reads_of(step.attention))
        out = self._out(step.attention.out)
        yield from AttentionSteps(self.place, self.shape).launches(step.attention, q, k, v, out)

    def _experts(self, step: Moe) -> Iterator[Launch]:
        x, used, (most, count) = self._current[step.x.name], step.used, self._lines
        router = self.place.weights[step.router].quant_type
        launches, (given,) = self._quantized(x, step.x.width, [router])
        logits = self._scratch("router logits", step.experts)
        yield from launches
        sms = self.place.card.sms
        yield products.multiply(self._weight(step.router), given, NOWHERE, most, count, logits, sms)
        chosen = self._chosen(step)
        piece = products.expert_piece(most * used, step.experts)
        yield experts.choose(step, logits, chosen, most, count)
        yield experts.group(step, chosen, piece, count)
        gate, up = (self._scratch(f"expert {name}", step.ffn_width, used) for name in ("gate", "up"))
        yield from self._expert_products(step, x, step.x.width, ((step.gate, gate), (step.up, up)), chosen, piece)
        yield rows.elementwise("silu_mul", (gate, up), gate, used * step.ffn_width, most, count)
        down = self._scratch("expert down", step.out.width, used)
        yield from self._expert_products(step, gate, step.ffn_width, ((step.down, down),), chosen, piece, used)
        yield experts.combine(step, down, chosen, self._out(step.out), most, count)

    def _chosen(self, step: Moe) -> experts.ExpertPlaces:
        at, lines = self.place.regions.at, experts.choice_bytes(step, self._room)
        names = ("expert ids", "expert weights", "expert lines")
        items = at("expert items", experts.items_bytes(step, self._room, _LEAST_PIECE))
        ids, weights, ordered = (at(name, lines) for name in names)
        return experts.ExpertPlaces(ids, weights, ordered, items, at("expert count", 4))

    def _expert_products(
        self,
        step: Moe,
        x: np.uint64,
        width: int,
        outs: Sequence[tuple[str, np.uint64]],
        chosen: experts.ExpertPlaces,
        piece: int,
        multiple: int = 1,
    ) -> Iterator[Launch]:
        """`multiple`: x has so many lines a row, one for each expert that it uses, or one for all of them."""
        weights = [self.place.weights[name] for name, _ in outs]
        launches, given = self._quantized(x, width, [weight.quant_type for weight in weights], multiple)
        yield from launches
        most_items = experts.max_items(step, self._lines[0], piece)
        divisor = 1 if multiple > 1 else step.used
        lines = products.Experts(chosen.items, chosen.item_count, chosen.lines, most_items, piece, divisor)
        for (name, out), weight, activations in zip(outs, weights, given, strict=True):
            matrix, sms = self._weight(name), self.place.card.sms
            yield products.multiply_experts(matrix, weight.matrix_bytes, activations, lines, out, sms)
