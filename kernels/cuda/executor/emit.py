"""Steps of a program as launches: which kernels, over which buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from llamaclust.kernels.cuda.executor.emit_attention import AttentionSteps
from llamaclust.kernels.cuda.executor.fuse import Attended, Gated, GpuStep, Norm, fuse_for_gpu
from llamaclust.kernels.cuda.executor.launch_context import LaunchContext
from llamaclust.kernels.cuda.executor.shapes import Shape
from llamaclust.kernels.cuda.launches import attention, elementwise, experts, matmul
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.device import NULL, Launch
from llamaclust.kernels.fuse import Attend, Products, reads_of, written_by
from llamaclust.kernels.fuse import elementwise as operation_of
from llamaclust.model import program as ir
from llamaclust.model.quant_types import ActivationFormat, QuantType

_FLOAT = 4
_LEAST_PIECE = 8
"""Lines of experts that products take together, at least."""


@dataclass(slots=True)
class Emitter:
    """Emits the launches of a program for one shape."""

    context: LaunchContext
    shape: Shape
    _selected: bool = False
    _current: dict[str, np.uint64] = field(default_factory=dict)  # where a buffer's newest values are
    _quantized: dict[ActivationFormat, str] = field(default_factory=dict)  # the buffer that is there in this format

    def launches(self) -> Iterator[Launch]:
        program = self.context.program
        if not program.is_first:
            self._out(program.hidden)
        yield from self._rotations()
        yield from AttentionSteps(self.context, self.shape).plans()
        for step in fuse_for_gpu(program, lambda name: self.context.weights[name].quant_type):
            if isinstance(step, ir.SelectRows) and self.shape.outputs == 0:
                return
            yield from self._emit(step)

    def _emit(self, step: GpuStep) -> Iterator[Launch]:
        match step:
            case ir.Embed():
                yield matmul.embed(
                    self._weight(step.weight), self.context.inputs.tokens, self._rows, self._out(step.out)
                )
            case Products():
                yield from self._products(step.x, step.steps)
            case Attend():
                yield from self._attend(step)
            case Attended():
                yield from self._attend(step.attend, step.format)
            case Norm():
                yield self._norm(step)
            case Gated():
                yield self._gated(step)
            case ir.Moe():
                yield from self._experts(step)
            case ir.SelectRows():
                x, self._selected = self._current[step.x.name], True
                self._quantized.clear()
                out = self._out(step.out)
                yield elementwise.select_rows(x, self.context.inputs.output_rows, out, step.x.width, self._rows)
            case _:
                yield from self._row_step(step)

    @property
    def _rows(self) -> RowCount:
        if self._selected:
            return RowCount(self.shape.outputs, self.context.inputs.outputs)
        return RowCount(self.shape.rows, self.context.inputs.rows)

    @property
    def _room(self) -> int:
        """Rows of a buffer."""
        return self.context.limits.max_outputs if self._selected else self.context.limits.max_batch_tokens

    def _out(self, buffer: ir.Buffer) -> np.uint64:
        self._current[buffer.name] = self._scratch(buffer.name, buffer.width)
        return self._current[buffer.name]

    def _scratch(self, name: str, width: int, multiple: int = 1) -> np.uint64:
        self._is_written(name)
        return self.context.layout.at((name, self._selected), _FLOAT * width * multiple * self._room)

    def _is_written(self, name: str) -> None:
        self._quantized = {kind: owner for kind, owner in self._quantized.items() if owner != name}

    def _weight(self, name: str) -> matmul.Weights:
        return self.context.weights[name]

    def _vector(self, name: str | None) -> np.uint64:
        return NULL if name is None else self.context.weights[name].address

    def _activations(self, kind: ActivationFormat, name: str, width: int, multiple: int = 1) -> np.uint64:
        """The destination of `name` in this format."""
        self._quantized[kind] = name
        n_bytes = matmul.activation_bytes(kind, self._room * multiple, width)
        return self.context.layout.at(("activations", kind), n_bytes)

    def _quantize(self, x: ir.Buffer, weights: Sequence[str]) -> Iterator[Launch]:
        """Quantizes x in each format of the weights that is not there yet."""
        for kind in dict.fromkeys(self._weight(weight).activation for weight in weights):
            if kind is not ActivationFormat.F32 and self._quantized.get(kind) != x.name:
                out = self._activations(kind, x.name, x.width)
                yield matmul.quantize(kind, (self._current[x.name],), x.width, self._rows, out)

    def _activation_of(self, weight: matmul.Weights, x: np.uint64) -> np.uint64:
        """The address of x in the format of the weight."""
        kind = weight.activation
        return x if kind is ActivationFormat.F32 else self.context.layout.at(("activations", kind), 0)

    def _products(self, x: ir.Buffer, steps: Sequence[ir.MatMul]) -> Iterator[Launch]:
        at, sms = self._current[x.name], self.context.gpu.sms
        yield from self._quantize(x, [step.weight for step in steps])
        products = [
            matmul.Product(self._weight(step.weight), self._vector(step.bias), self._out(step.out)) for step in steps
        ]
        yield matmul.multiply(products, self._activation_of(products[0].weights, at), self._rows, sms)

    def _norm(self, step: Norm) -> Launch:
        norm, y, total = step.norm, NULL, NULL
        x = self._current[norm.x.name if step.add is None else step.add.x.name]
        if step.add is not None:
            y, total = self._current[step.add.y.name], self._out(step.add.out)
        floats = self._out(norm.out)

        def place(kind: ActivationFormat) -> np.uint64:
            if kind not in step.formats:
                return NULL
            return floats if kind is ActivationFormat.F32 else self._activations(kind, norm.out.name, norm.width)

        outs = place(ActivationFormat.F32), place(ActivationFormat.Q8_32), place(ActivationFormat.Q8_256)
        weight = self._vector(norm.weight)
        return elementwise.add_rms_norm(norm, (x, y), weight, total, outs, self._rows)

    def _gated(self, step: Gated) -> Launch:
        gate, up = self._current[step.gate.name], self._current[step.up.name]
        self._out(step.out)
        out = self._activations(step.format, step.out.name, step.out.width)
        return matmul.quantize(step.format, (gate, up), step.out.width, self._rows, out, step.function)

    def _row_step(self, step: ir.RowStep) -> Iterator[Launch]:
        x, *others = (self._current[buffer.name] for buffer in reads_of(step))
        out = x if isinstance(step, ir.Rope) else self._out(written_by(step))
        width, rows = written_by(step).width, self._rows
        match step:
            case ir.RmsNorm():
                weight = self._vector(step.weight)
                yield elementwise.rms_norm(step, x, weight, out, rows)
            case ir.LayerNorm():
                weight, bias = self._vector(step.weight), self._vector(step.bias)
                yield elementwise.layer_norm(step, x, weight, bias, out, rows)
            case ir.AddPosition():
                added = self._scratch("positions", width)
                yield matmul.embed(self._weight(step.weight), self.context.inputs.positions, rows, added)
                yield elementwise.elementwise("add", (x, added), out, width, rows)
            case ir.Rope():
                yield self._rotated(step, x)
            case ir.Slice():
                yield elementwise.slice_rows(step, x, out, rows)
            case ir.SigmoidGate():
                weight = self._vector(step.weight)
                yield elementwise.sigmoid_gate(step, x, weight, others[0], out, rows)
            case _:
                operation, number = operation_of(step)
                numbers = () if number is None else (np.float32(number),)
                yield elementwise.elementwise(operation, (x, *others, *numbers), out, width, rows)

    def _rotations(self) -> Iterator[Launch]:
        """Of every table, once for all layers."""
        tables = dict.fromkeys(step.table for step in self.context.program.steps if isinstance(step, ir.Rope))
        for table in tables:
            frequencies = self.context.layout.constant(np.array(table.frequencies, np.float64))
            positions = self.context.inputs.positions
            yield elementwise.rotation(table, positions, frequencies, self._angles(table), self._rows)

    def _angles(self, table: ir.RopeTable) -> np.uint64:
        n_bytes = _FLOAT * 2 * len(table.frequencies) * self.context.limits.max_batch_tokens
        return self.context.layout.at(("rotation", table), n_bytes)

    def _rotated(self, step: ir.Rope, x: np.uint64) -> Launch:
        self._is_written(step.x.name)
        return elementwise.rope(step, x, self._angles(step.table), self._rows)

    def _attend(self, step: Attend, wanted: ActivationFormat | None = None) -> Iterator[Launch]:
        """`wanted`: the only format of the result, if the kernel supports it."""
        steps, rotation = AttentionSteps(self.context, self.shape), self._rotation(step)
        if rotation is attention.NO_ROTATION:
            for rope in (step.rotate_q, step.rotate_k):
                if rope is not None:
                    yield self._rotated(rope, self._current[rope.x.name])
        q, k, v = (self._current[buffer.name] for buffer in (step.attention.q, step.attention.k, step.attention.v))
        out = self._out(step.attention.out)
        by_32 = by_256 = NULL
        if wanted is not None and attention.can_quantize(step.attention, steps.room):
            at = self._activations(wanted, step.attention.out.name, step.attention.out.width)
            by_32, by_256 = (at, NULL) if wanted is ActivationFormat.Q8_32 else (NULL, at)
        yield from steps.launches(step.attention, (q, k, v), out, rotation, (by_32, by_256))

    def _rotation(self, step: Attend) -> attention.Rotation:
        """What queries and keys have in common, so that they rotate while keys are stored."""
        q, k = step.rotate_q, step.rotate_k
        if q is None or k is None or (q.table, q.style) != (k.table, k.style):
            return attention.NO_ROTATION
        return attention.Rotation(self._angles(q.table), len(q.table.frequencies), q.style)

    def _experts(self, step: ir.Moe) -> Iterator[Launch]:
        x, used, rows = self._current[step.x.name], step.used, self._rows
        router = self._weight(step.router)
        yield from self._quantize(step.x, [step.router])
        logits = self._scratch("router logits", step.experts)
        given, sms = self._activation_of(router, x), self.context.gpu.sms
        yield matmul.multiply([matmul.Product(router, NULL, logits)], given, rows, sms)
        chosen = self._chosen(step)
        piece = matmul.expert_piece(rows.bucket * used, step.experts)
        yield experts.choose(step, logits, chosen, rows)
        yield experts.group(step, chosen, piece, rows)
        gate, up = (self._scratch(f"expert {name}", step.ffn_width, used) for name in ("gate", "up"))
        yield from self._quantize(step.x, [step.gate, step.up])
        yield from self._expert_products(step, x, ((step.gate, gate), (step.up, up)), chosen, piece, used)
        yield self._expert_gate(step, gate, up)
        down = self._scratch("expert down", step.out.width, used)
        yield from self._expert_products(step, gate, ((step.down, down),), chosen, piece, 1)
        yield experts.combine(step, down, chosen, self._out(step.out), rows)

    def _expert_gate(self, step: ir.Moe, gate: np.uint64, up: np.uint64) -> Launch:
        """silu(gate) * up, as floats where it is or quantized."""
        rows, used, kind = self._rows, step.used, self._weight(step.down).activation
        if kind is ActivationFormat.F32:
            return elementwise.elementwise("silu_mul", (gate, up), gate, used * step.ffn_width, rows)
        out = self._activations(kind, "expert gate", step.ffn_width, used)
        silu, rows = ir.ActivationFunction.SILU, rows.times(used)
        return matmul.quantize(kind, (gate, up), step.ffn_width, rows, out, silu)

    def _chosen(self, step: ir.Moe) -> experts.ExpertBuffers:
        at, lines = self.context.layout.at, experts.choice_bytes(step, self._room)
        names = ("expert ids", "expert weights", "expert lines")
        items = at("expert items", experts.items_bytes(step, self._room, _LEAST_PIECE))
        ids, weights, ordered = (at(name, lines) for name in names)
        return experts.ExpertBuffers(ids, weights, ordered, items, at("expert count", 4))

    def _expert_products(
        self,
        step: ir.Moe,
        x: np.uint64,
        outs: Sequence[tuple[str, np.uint64]],
        chosen: experts.ExpertBuffers,
        piece: int,
        divisor: int,
    ) -> Iterator[Launch]:
        """`divisor`: how many lines share a row of x."""
        most_items = experts.max_items(step, self._rows.bucket, piece)
        lines = matmul.Experts(chosen.items, chosen.item_count, chosen.lines, most_items, piece, divisor)
        alike: dict[QuantType, list[tuple[str, np.uint64]]] = {}
        for name, out in outs:
            alike.setdefault(self._weight(name).quant_type, []).append((name, out))
        for group in alike.values():
            products = [matmul.Product(self._weight(name), NULL, out) for name, out in group]
            given, sms = self._activation_of(products[0].weights, x), self.context.gpu.sms
            yield matmul.multiply_experts(products, given, lines, sms)
