"""Compiles a program to a plan for the native executor. Steps are fused, and buffer names become numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import Plan
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.cpu.buffers import Buffers
from llamaclust.kernels.cpu.plan_experts import PlanExperts
from llamaclust.kernels.cpu.plan_kv import PlanKv
from llamaclust.kernels.cpu.plan_scan import add_norm, add_scan
from llamaclust.kernels.cpu.ranges import check_ranges
from llamaclust.kernels.fuse import Adapts, Attend, FusedStep, Products, elementwise, fuse
from llamaclust.kernels.gathers import gather_formats, packed_width
from llamaclust.kernels.packed.weights import Weight
from llamaclust.model import program as ir
from llamaclust.model.quant_types import ActivationFormat, QuantType
from llamaclust.model.steps.options import RopeStyle

_FORMATS = (ActivationFormat.F32, ActivationFormat.Q8_32, ActivationFormat.Q8_256)
"""The activation formats, in the order of their numbers in the native module."""

_SLOTS = 4
"""The maximum number of quantized activations that the native module holds at the same time."""


@dataclass(frozen=True, slots=True)
class InputCopy:
    """A buffer into which each run copies the rows that are multiplied by the matrices named in `weights`."""

    weights: tuple[str, ...]
    buffer: int  # Number of the buffer that gets the copy.
    choice: int | None = None  # Number of the buffer with the ids of each row's experts.
    used: int = 1  # Number of inputs of a row, if each of its experts has its own input.
    heads: int = 1  # Number of heads in a row.


@dataclass(frozen=True, slots=True)
class RowScales:
    """A buffer with one number per row: the row's scale for LoRA adapter number `adapter`, times `factor`."""

    buffer: int
    adapter: int
    factor: float


@dataclass(frozen=True, slots=True)
class Compiled:
    plan: Plan
    normed: int | None
    scales: tuple[RowScales, ...] = ()
    kv_layers: tuple[tuple[int, ...], ...] = ()  # For each layer, the plan's numbers of its KV memory and states.


class Compiler:
    def __init__(
        self, program: ir.Program, weights: Mapping[str, Weight], limits: StageLimits, observed: list[InputCopy] | None
    ) -> None:
        check_ranges(program, limits)
        self._observed = observed
        self.normed: int | None = None
        self.plan = Plan(
            limits.max_batch_tokens,
            limits.max_outputs,
            limits.max_sequences,
            limits.max_context_tokens,
            limits.kv_blocks,
            limits.window_blocks,
            limits.state_blocks,
        )
        self._limits = limits
        self._program = program
        self._weights = weights
        self._buffers = Buffers(self.plan, limits.max_batch_tokens)
        self._kv = PlanKv(self.plan, limits)
        self._gather_formats = gather_formats(program, {name: weight.quant_type for name, weight in weights.items()})
        self._rotations: dict[tuple[ir.RopeTable, tuple[int, ...] | None], int] = {}
        self._scales: dict[tuple[int, float, int], RowScales] = {}  # Keys are (adapter, factor, rank).

    @property
    def _experts(self) -> PlanExperts:
        # Not stored, because the reference cycle with the compiler would keep all weights in memory.
        copy = None if self._observed is None else self._copy
        return PlanExperts(self.plan, self._buffers, self._weights, self._activations, self._observe, copy)

    def run(self) -> Compiled:
        if not self._program.is_first:
            self.plan.read_hidden(self._buffers.write(self._program.hidden, private=True))
        for step in fuse(self._program):
            self._emit(step)
        self._finish(self._program.out)
        return Compiled(self.plan, self.normed, tuple(self._scales.values()), self._kv.by_layer(self._program))

    def _emit(self, step: FusedStep) -> None:
        buffers = self._buffers
        match step:
            case ir.Embed():
                self.plan.embed(self._weights[step.weight].matrix, buffers.write(step.out, private=True))
            case Products():
                self._products(step.x, step.steps)
            case Adapts():
                self.plan.enter_adapter(step.adapter)
                self._adapt(step.x, step.steps)
                self.plan.leave_adapter()
            case ir.HeadMatMul():
                self._multiply_heads(step)
            case Attend():
                self._attend(step.attention, step.rotate_q, step.rotate_k)
            case ir.Convolution():
                self._convolve(step)
            case ir.DeltaRule():
                self._delta_rule(step)
            case ir.Scan():
                x, dt, layer = buffers.read(step.x), buffers.read(step.dt), self._kv.state(step.state)
                add_scan(self.plan, step, (x, dt, buffers.write(step.out)), layer, self._weights)
            case ir.Moe() | ir.ExpertChoice() | ir.ExpertShards() | ir.ExpertSum():
                self._experts.emit(step)
            case ir.ExpertInner() | ir.ExpertDown():
                self._experts.emit(step)
            case ir.SelectRows():
                x = buffers.read(step.x)
                if (normed := self._program.normed) is not None:
                    self.normed = self._copy(buffers.read(normed), normed.width)
                buffers.rows = self._limits.max_outputs
                self.plan.select_rows(x, buffers.write(step.out, private=True))
            case ir.MergeRows() | ir.MeanRows():
                x = buffers.read(step.x)
                buffers.rows = -(-buffers.rows // step.factor)
                out = buffers.write(step.out, private=True)
                self.plan.merge_rows(x, out, step.factor, isinstance(step, ir.MeanRows))
            case ir.Exchange():
                raise AssertionError("an Exchange step reached the CPU backend, which computes experts itself")
            case ir.Gather():
                self._gather(step)
            case _:
                self._emit_rows(step)

    def _gather(self, step: ir.Gather) -> None:
        form = next(self._gather_formats)
        if form is not None and self._observed is None:
            return self._gather_packed(step, form)
        own, lines = None if step.x is None else self._shared(step.x, step.lines), step.lines
        out = ir.Buffer(step.out.name, step.out.width // lines)
        return self.plan.gather(own, self._buffers.write(out, lines), step.borders, step.to)

    def _shared(self, x: ir.Buffer, lines: int) -> int:
        read = self._buffers.read(x)
        if self._buffers.is_shared(x):
            return read
        out = self._buffers.write(ir.Buffer(f"shared {x.name}", x.width // lines), lines)
        self.plan.write_result(read, out)
        return out

    def _gather_packed(self, step: ir.Gather, form: ActivationFormat) -> None:
        """Quantizes columns to int8 before the gather, to send fewer bytes. The matrix products need int8 anyway."""
        assert step.x is not None
        own, whole = (ir.Buffer(buffer.name, buffer.width // step.lines) for buffer in (step.x, step.out))
        packed = self._buffers.write(_packed(own, form), step.lines)
        self.plan.pack(self._buffers.read(own), packed, _FORMATS.index(form))
        borders = [packed_width(border, form) for border in step.borders]
        self.plan.gather(packed, self._buffers.write(_packed(whole, form), step.lines), borders, step.to)
        self._buffers.packed[step.out.name] = form

    def _emit_rows(self, step: ir.RowStep) -> None:
        plan = self.plan
        x, *others = map(self._buffers.read, step.reads)
        if isinstance(step, ir.SoftCap) and step.x == step.out and self._buffers.is_shared(step.x):
            plan.elementwise("soft_cap", x, x, x, step.cap)
            return
        y = others[0] if others else x
        out = self._buffers.write(step.out, private=True)
        match step:
            case ir.RmsNorm():
                add_norm(plan, step, x, out, self._weights)
            case ir.LayerNorm():
                norm, bias = self._weights[step.weight].vector, self._vector(step.bias)
                plan.layer_norm(x, out, norm, np.zeros_like(norm) if bias is None else bias, step.epsilon)
            case ir.AddPosition():
                plan.add_position(x, out, self._weights[step.weight].matrix)
            case ir.AddRow():
                plan.add_row(x, out, self._weights[step.weight].matrix, step.row)
            case ir.Rope():
                plan.rope(x, out, step.heads, step.head_dim, self._rotation(step))
            case ir.PositionScale():
                plan.scale_by_position(x, out, step.factor, step.length, step.offset)
            case ir.ScaleByWeight(by_channel=True):
                plan.scale_channels(x, out, self._weights[step.weight].vector)
            case ir.ScaleByWeight():
                plan.elementwise("scale", x, x, out, float(self._weights[step.weight].vector[0]))
            case ir.Clamp():
                low, high = (float(self._weights[name].vector[0]) for name in (step.low, step.high))
                plan.elementwise("at_least", x, x, out, low)
                plan.elementwise("at_most", out, out, out, high)
            case ir.GivenRows():
                plan.add_given(x, out, step.level, step.adds)
            case ir.Mix():
                coefficients = None if step.coefficients is None else others[1]
                plan.mix(x, y, out, coefficients, step.width, step.first, step.offset)
            case ir.MatchMagnitude():
                plan.match_magnitude(x, y, out, step.epsilon)
            case ir.GaussianTopK():
                plan.gaussian_top_k(x, out, step.factor)
            case ir.Slice():
                plan.copy_channels(x, out, step.heads, step.start, 0, step.out.width // step.heads)
            case ir.Join():
                channels = step.x.width // step.heads
                plan.copy_channels(x, out, step.heads, 0, 0, channels)
                plan.copy_channels(y, out, step.heads, 0, channels, step.y.width // step.heads)
            case ir.SigmoidGate():
                plan.sigmoid_gate(x, y, out, self._weights[step.weight].vector)
            case ir.Decay():
                weight, bias = (self._weights[name].vector for name in (step.weight, step.bias))
                plan.decay(x, out, weight.repeat(step.x.width // step.heads), bias)
            case _:
                op, number = elementwise(step)
                plan.elementwise(op, x, y, out, number or 0)

    def _finish(self, out: ir.Buffer) -> None:
        result = self._buffers.read(out)
        self.plan.set_result(result if self._buffers.is_shared(out) else self._copy(result, out.width))

    def _rotation(self, step: ir.Rope) -> tuple[int, bool]:
        table, sections = key = step.table, step.sections
        if key not in self._rotations:
            self._rotations[key] = self.plan.add_rotation(table.frequencies, table.scale, sections or ())
        return self._rotations[key], step.style is RopeStyle.NEOX

    def _quantize(self, x: int, types: Sequence[QuantType]) -> list[int]:
        slots: dict[ActivationFormat, int] = {}
        for kind in types:
            activation = kind.info.activation
            assert activation is not None
            if activation not in slots:
                slots[activation] = len(slots)
                self.plan.quantize(x, slots[activation], _FORMATS.index(activation))
        return [slots[kind.info.activation] for kind in types if kind.info.activation is not None]

    def _activations(self, x: ir.Buffer, types: Sequence[QuantType]) -> list[int]:
        form = self._buffers.packed.get(x.name)
        if form is None:
            return self._quantize(self._buffers.read(x), types)
        self.plan.unpack(self._buffers.read(_packed(x, form)), 0, _FORMATS.index(form))
        return [0] * len(types)

    def _observe(self, names: Sequence[str], x: ir.Buffer, choice: int | None = None, used: int = 1) -> None:
        if self._observed is None:
            return
        copy = self._copy(self._buffers.read(x), x.width, used)
        self._observed.append(InputCopy(tuple(names), copy, choice, used))

    def _copy(self, x: int, width: int, multiple: int = 1) -> int:
        out = self.plan.add_buffer(width, multiple, False, self._buffers.rows)
        self.plan.write_result(x, out)
        return out

    def _products(self, x: ir.Buffer, steps: Sequence[ir.MatMul]) -> None:
        self._observe([step.weight for step in steps], x)
        weights = [self._weights[step.weight] for step in steps]
        slots = self._activations(x, [weight.quant_type for weight in weights])
        self.plan.multiply(
            [
                (weight.matrix, self._vector(step.bias), self._buffers.write(step.out), slot)
                for step, weight, slot in zip(steps, weights, slots, strict=True)
            ]
        )

    def _multiply_heads(self, step: ir.HeadMatMul) -> None:
        if self._observed is not None:
            copy = self._copy(self._buffers.read(step.x), step.x.width)
            self._observed.append(InputCopy((step.weight,), copy, heads=step.heads))
        weight, slot = self._weights[step.weight], 0
        activation = weight.quant_type.info.activation
        assert activation is not None
        self.plan.quantize(self._buffers.read(step.x), slot, _FORMATS.index(activation), step.heads)
        self.plan.multiply_heads(list(weight.matrices), self._buffers.write(step.out), slot)

    def _adapt(self, x: ir.Buffer, steps: Sequence[ir.Adapt]) -> None:
        """Emits the matrix products of adapters: first with all `down` matrices, and then with the `up` matrices."""
        down = [self._weights[step.down] for step in steps]
        inner = [ir.Buffer(f"adapter {place} of rank {step.rank}", step.rank) for place, step in enumerate(steps)]
        slots = self._quantize(self._buffers.read(x), [weight.quant_type for weight in down])
        outs = [self._buffers.write(buffer) for buffer in inner]
        self.plan.multiply(
            [(weight.matrix, None, out, slot) for weight, out, slot in zip(down, outs, slots, strict=True)]
        )
        for start in range(0, len(steps), _SLOTS):
            self._add_adapted(steps[start : start + _SLOTS], inner[start : start + _SLOTS])

    def _add_adapted(self, steps: Sequence[ir.Adapt], inner: Sequence[ir.Buffer]) -> None:
        products, sums = [], []
        for slot, (step, buffer) in enumerate(zip(steps, inner, strict=True)):
            plain = self._buffers.read(buffer)
            scaled = self._buffers.write(buffer, private=True)
            self.plan.elementwise("mul", plain, self._row_scales(step), scaled, 0)
            self.plan.quantize(scaled, slot, _FORMATS.index(ActivationFormat.F32))
            added = self._buffers.write(ir.Buffer(f"adapted {slot} of {step.out.width}", step.out.width))
            products.append((self._weights[step.up].matrix, None, added, slot))
            sums.append((self._buffers.read(step.out), added, self._row_scales(step)))
        self.plan.multiply(products)
        for out, added, scale in sums:
            self.plan.add_adapted(out, added, scale)

    def _row_scales(self, step: ir.Adapt) -> int:
        key = step.adapter, step.factor, step.rank
        if key not in self._scales:
            buffer = self.plan.add_buffer(step.rank, 1, False, self._limits.max_batch_tokens)
            self._scales[key] = RowScales(buffer, step.adapter, step.factor)
        return self._scales[key].buffer

    def _attend(self, step: ir.Attention, rotate_q: ir.Rope | None, rotate_k: ir.Rope | None) -> None:
        value = None if step.v is None or step.shares_kv else self._buffers.read(step.v)
        self.plan.attend(
            self._buffers.read(step.q),
            None if step.shares_kv else (self._buffers.read(step.k), value),
            self._buffers.write(step.out),
            self._kv.attention(step),
            step.heads,
            step.kv_heads,
            (step.head_dim, step.value_dim),
            step.scale,
            step.soft_cap,
            step.slopes or (),
            None if step.window is None else (step.window, step.chunked),
            None if rotate_q is None else self._rotation(rotate_q),
            None if rotate_k is None else self._rotation(rotate_k),
            (step.causal, step.grouped),
            self._vector(step.sinks),
        )

    def _convolve(self, step: ir.Convolution) -> None:
        x, layer = self._buffers.read(step.x), self._kv.state(step.state)
        weight, bias = self._weights[step.weight].matrix, self._vector(step.bias)
        self.plan.convolve(x, self._buffers.write(step.out), layer, weight, bias)

    def _delta_rule(self, step: ir.DeltaRule) -> None:
        q, k, v, decay, beta = map(self._buffers.read, step.reads)
        layer, out = self._kv.state(step.state), self._buffers.write(step.out)
        self.plan.delta_rule(q, k, v, decay, beta, out, layer, step.heads, step.key_heads, step.tiled)

    def _vector(self, name: str | None) -> Float32 | None:
        return None if name is None else self._weights[name].vector


def _packed(buffer: ir.Buffer, form: ActivationFormat) -> ir.Buffer:
    return ir.Buffer(f"{form.name} {buffer.name}", packed_width(buffer.width, form))


def compile_program(
    program: ir.Program, weights: Mapping[str, Weight], limits: StageLimits, observed: list[InputCopy] | None = None
) -> Compiled:
    """Compiles a program. Adds copies of matrix inputs to `observed`. Raises ValueError for an invalid program."""
    return Compiler(program, weights, limits, observed).run()
