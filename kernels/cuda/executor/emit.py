from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels._native import log
from llamaclust.kernels.cuda.executor.experts import ExpertsEmitter
from llamaclust.kernels.cuda.executor.fuse import Attended, Gated, GpuStep, Norm, fuse_for_gpu
from llamaclust.kernels.cuda.executor.host_steps import HostStep
from llamaclust.kernels.cuda.executor.operands import Operands, kv_name
from llamaclust.kernels.cuda.launches import attention, elementwise, experts, matmul, mixing, sampling, states
from llamaclust.kernels.cuda.runtime.device import NULL, Launch
from llamaclust.kernels.fuse import Adapts, Attend, Products
from llamaclust.kernels.fuse import elementwise as operation_of
from llamaclust.kernels.gathers import gather_formats
from llamaclust.model import program as ir
from llamaclust.model.quant_types import ActivationFormat, QuantType


def position_factors(step: ir.PositionScale, context_tokens: int) -> NDArray[np.float32]:
    """Returns the step's factors for positions below `context_tokens`. Each factor is for `step.length` positions."""
    lengths = range(1, (context_tokens - 1 + step.offset) // step.length + 2)
    return np.array([1 + step.factor * log(length) for length in lengths], np.float32)


def _first_in_order(launches: Iterator[Launch | HostStep]) -> Iterator[Launch | HostStep]:
    """Makes the first launch wait for all earlier work, so that later launches may read the results without waiting."""
    for number, launch in enumerate(launches):
        yield replace(launch, in_order=True) if number == 0 and isinstance(launch, Launch) else launch


def fused_steps(program: ir.Program, types: Mapping[str, QuantType], *, given: bool) -> tuple[GpuStep, ...]:
    """Groups a program's steps into launches. If `given` is False, drops the steps that insert given rows."""
    if not given and program.given_levels:
        kept = (step for step in program.steps if not (isinstance(step, ir.GivenRows) and step.x == step.out))
        program = replace(program, steps=tuple(kept))
    return tuple(fuse_for_gpu(program, types.__getitem__))


@dataclass(frozen=True)
class Emitter:
    ops: Operands
    steps: Sequence[GpuStep]

    def launches(self) -> Iterator[Launch | HostStep]:
        program = self.ops.program
        if not program.is_first:
            self.ops.out(program.hidden)
        yield from self._rotations()
        for attended in {attention.likeness(step): step for step in attention.attention_steps(program)}.values():
            yield self._attention.plan(attended, self._attention_plan(attended))
        yield from self._head_lines()
        yield from _first_in_order(self._steps())

    def _steps(self) -> Iterator[Launch | HostStep]:
        program = self.ops.program
        numbers: defaultdict[type[ir.Step], count[int]] = defaultdict(count)
        forms = gather_formats(program, {name: weight.quant_type for name, weight in self.ops.weights.items()})
        for step in self.steps:
            if isinstance(step, ir.SelectRows) and self.ops.shape.outputs == 0:
                return
            if isinstance(step, ir.Exchange | ir.Gather):
                self.ops.out(step.out)
                form = next(forms) if isinstance(step, ir.Gather) else None
                yield HostStep(step, next(numbers[type(step)]), self.ops.selected, form)
            elif isinstance(step, ir.GivenRows):
                yield from self._given(step)
            else:
                yield from self._emit(step)
        if program.is_last:
            yield from self._ranked()

    def _given(self, step: ir.GivenRows) -> Iterator[Launch | HostStep]:
        self.ops.is_written(step.out.name)
        if step.x != step.out:
            x = self.ops.current[step.x.name]
            yield elementwise.copy_rows(x, self.ops.out(step.out), step.out.width, self.ops.rows)
        if self.ops.shape.given:
            yield HostStep(step, step.level, self.ops.selected)

    def _ranked(self) -> Iterator[Launch]:
        ops, vocabulary = self.ops, self.ops.program.out.width
        pieces = ops.scratch("greatest logits", sampling.piece_count(vocabulary))
        records = ops.layout.at("records", 8 * sampling.record_words(vocabulary) * ops.room)
        ops.layout.at("divisors", 4 * ops.room)
        ops.layout.at("totals", 8 * sampling.sums_of_row(vocabulary) * ops.room)
        yield from sampling.rank_logits(ops.current[ops.program.out.name], vocabulary, pieces, records, ops.rows)

    def _emit(self, step: GpuStep) -> Iterator[Launch]:
        match step:
            case ir.Embed():
                yield self._embed(step.weight, self.ops.inputs.tokens, self.ops.out(step.out))
            case Products():
                yield from self._products(step.x, step.steps)
            case ir.HeadMatMul():
                yield from self._multiply_heads(step)
            case ir.Convolution():
                yield from self._convolve(step)
            case ir.DeltaRule():
                inputs = tuple(self.ops.current[buffer.name] for buffer in step.reads)
                yield self._states(step.state).delta_rule(step, inputs, self.ops.out(step.out))
            case ir.Scan():
                yield self._scan(step)
            case Adapts():
                raise AssertionError("programs with adapters are refused")
            case Attend():
                raise AssertionError("no kernel computes Attend steps, but fuse_for_gpu left one")
            case Attended():
                yield from self._attend(step)
            case Norm():
                yield self._norm(step)
            case Gated():
                yield self._gated(step)
            case ir.Moe():
                yield from ExpertsEmitter(self.ops, step).launches()
            case ir.ExpertChoice() | ir.ExpertInner() | ir.ExpertDown() | ir.ExpertShards() | ir.ExpertSum():
                raise AssertionError("programs with only some of a layer's experts are refused")
            case ir.MergeRows() | ir.MeanRows():
                yield self._merge_rows(step)
            case ir.Exchange() | ir.Gather() | ir.GivenRows():
                raise AssertionError("no kernel computes Exchange, Gather or GivenRows steps, but one was requested")
            case ir.SelectRows():
                x, self.ops.selected = self.ops.current[step.x.name], True
                self.ops.quantized.clear()
                out = self.ops.out(step.out)
                yield elementwise.select_rows(x, self.ops.inputs.output_rows, out, step.x.width, self.ops.rows)
            case _:
                yield from self._row_step(step)

    def _merge_rows(self, step: ir.FewerRows) -> Launch:
        x = self.ops.current[step.x.name]
        self.ops.merge(step.factor)
        out = self.ops.out(step.out)
        if isinstance(step, ir.MeanRows):
            return mixing.mean_rows(step, x, out, self.ops.rows)
        return elementwise.copy_rows(x, out, step.out.width, self.ops.rows)

    def _embed(self, weight: str, ids: np.uint64, out: np.uint64) -> Launch:
        return matmul.embed(self.ops.weights[weight], ids, self.ops.rows, out)

    def _products(self, x: ir.Buffer, steps: Sequence[ir.MatMul]) -> Iterator[Launch]:
        at = self.ops.current[x.name]
        yield from self.ops.quantize(x, [step.weight for step in steps])
        products = [
            matmul.Product(self.ops.weights[step.weight], self.ops.vector(step.bias), self.ops.out(step.out))
            for step in steps
        ]
        yield matmul.multiply(products, self.ops.activation_of(products[0].weights, at), self.ops.rows, self.ops.gpu)

    def _lines_by_head(self, heads: int) -> matmul.Experts:
        ops, bucket = self.ops, self.ops.rows.bucket
        piece = matmul.expert_piece(bucket * heads, heads)
        most_items = heads * -(-bucket // piece)
        sizes = {"lines": 4 * bucket * heads, "items": 12 * heads * -(-bucket // matmul.LEAST_PIECE), "count": 4}
        lines, items, count = (ops.layout.at((f"{name} by head", heads), n_bytes) for name, n_bytes in sizes.items())
        return matmul.Experts(items, count, lines, most_items, piece, 1)

    def _head_lines(self) -> Iterator[Launch]:
        steps = self.ops.program.steps
        for heads in dict.fromkeys(step.heads for step in steps if isinstance(step, ir.HeadMatMul)):
            yield experts.by_head(heads, self._lines_by_head(heads), self.ops.rows)

    def _multiply_heads(self, step: ir.HeadMatMul) -> Iterator[Launch]:
        ops, weights, width = self.ops, self.ops.weights[step.weight], step.x.width // step.heads
        x, kind = ops.current[step.x.name], weights.activation
        if kind is not ActivationFormat.F32:
            out = ops.activations(kind, f"{step.x.name} by head", width, step.heads)
            yield matmul.quantize(kind, x, width, ops.rows.times(step.heads), out)
        product, lines = matmul.Product(weights, NULL, ops.out(step.out)), self._lines_by_head(step.heads)
        yield matmul.multiply_experts([product], ops.activation_of(weights, x), lines, ops.gpu)

    def _states(self, state: ir.SequenceState) -> states.StateLaunches:
        sequences = min(self.ops.shape.rows, self.ops.limits.max_sequences)
        return states.StateLaunches(self.ops.inputs, sequences, self.ops.kv[kv_name(state)])

    def _convolve(self, step: ir.Convolution) -> Iterator[Launch]:
        x, weights, bias = self.ops.current[step.x.name], self.ops.weights[step.weight], self.ops.vector(step.bias)
        yield from self._states(step.state).convolve(step, x, weights, bias, self.ops.out(step.out), self.ops.rows)

    def _scan(self, step: ir.Scan) -> Launch:
        inputs = self.ops.current[step.x.name], self.ops.current[step.dt.name]
        weights = tuple(map(self.ops.vector, (step.bias, step.decay, step.skip)))
        return self._states(step.state).scan(step, inputs, weights, self.ops.out(step.out))

    def _norm(self, step: Norm) -> Launch:
        norm, y, total = step.norm, NULL, NULL
        x = self.ops.current[norm.x.name if step.add is None else step.add.x.name]
        if step.add is not None:
            y, total = self.ops.current[step.add.y.name], self.ops.out(step.add.out)
        floats = self.ops.out(norm.out)

        def place(kind: ActivationFormat) -> np.uint64:
            if kind not in step.formats:
                return NULL
            return floats if kind is ActivationFormat.F32 else self.ops.activations(kind, norm.out.name, norm.width)

        outs = place(ActivationFormat.F32), place(ActivationFormat.Q8_32), place(ActivationFormat.Q8_256)
        return elementwise.add_rms_norm(norm, (x, y), self.ops.norm_weight(norm), total, outs, self.ops.rows)

    def _gated(self, step: Gated) -> Launch:
        gate, up = self.ops.current[step.gate.name], self.ops.current[step.up.name]
        self.ops.out(step.out)
        out = self.ops.activations(step.format, step.out.name, step.out.width)
        inputs = elementwise.GatedInputs(f"{step.function}_mul", gate, up, step.out.width)
        return matmul.quantize_gated(step.format, inputs, step.out.width, self.ops.rows, out)

    def _row_step(self, step: ir.RowStep) -> Iterator[Launch]:
        x, *others = (self.ops.current[buffer.name] for buffer in step.reads)
        out = x if isinstance(step, ir.Rope) else self.ops.out(step.out)
        width, rows = step.out.width, self.ops.rows
        match step:
            case ir.RmsNorm():
                yield elementwise.rms_norm(step, x, self.ops.norm_weight(step), out, rows)
            case ir.LayerNorm():
                weight, bias = self.ops.vector(step.weight), self._bias(step)
                yield elementwise.layer_norm(step, x, weight, bias, out, rows)
            case ir.AddPosition():
                added = self.ops.scratch("positions", width)
                yield self._embed(step.weight, self.ops.inputs.positions, added)
                yield elementwise.elementwise("add", (x, added), out, width, rows)
            case ir.AddRow():
                added = self.ops.scratch("added row", width)
                yield self._embed(step.weight, self._numbers_of(step.row), added)
                yield elementwise.elementwise("add", (x, added), out, width, rows)
            case ir.GivenRows():
                raise AssertionError("no kernel computes GivenRows steps, but one was requested")
            case ir.Decay():
                yield states.decay(step, x, (self.ops.vector(step.weight), self.ops.vector(step.bias)), out, rows)
            case ir.PositionScale():
                positions = self.ops.inputs.positions
                yield elementwise.scale_by_position(step, x, self._factors(step), positions, out, rows)
            case ir.ScaleByWeight():
                yield mixing.scale_by_weight(step, x, self.ops.vector(step.weight), out, rows)
            case ir.Clamp():
                limits = self.ops.vector(step.low), self.ops.vector(step.high)
                yield elementwise.elementwise("clamp", (x, *limits), out, width, rows)
            case ir.Mix():
                yield mixing.mix(step, (x, *others), out, rows)
            case ir.MatchMagnitude():
                yield mixing.match_magnitude(step, x, others[0], out, rows)
            case ir.GaussianTopK():
                yield mixing.gaussian_top_k(step, x, out, rows)
            case ir.Join():
                yield elementwise.join_rows(step, x, others[0], out, rows)
            case ir.Rope():
                yield self._rotated(step, x)
            case ir.Slice():
                yield elementwise.slice_rows(step, x, out, rows)
            case ir.SigmoidGate():
                yield elementwise.sigmoid_gate(step, x, self.ops.vector(step.weight), others[0], out, rows)
            case _:
                operation, number = operation_of(step)
                numbers = () if number is None else (np.float32(number),)
                yield elementwise.elementwise(operation, (x, *others, *numbers), out, width, rows)

    def _numbers_of(self, row: int) -> np.uint64:
        return self.ops.layout.constant(np.full(self.ops.limits.max_batch_tokens, row, np.int32))

    def _bias(self, step: ir.LayerNorm) -> np.uint64:
        if step.bias is not None:
            return self.ops.vector(step.bias)
        return self.ops.layout.constant(np.zeros(step.out.width, np.float32))

    def _factors(self, step: ir.PositionScale) -> np.uint64:
        factors = position_factors(step, self.ops.limits.max_context_tokens)
        return self.ops.layout.constant(factors)

    def _rotations(self) -> Iterator[Launch]:
        ops, steps = self.ops, self.ops.program.steps
        ropes = {(step.table, step.sections): step for step in steps if isinstance(step, ir.Rope)}
        for (table, sections), rope in ropes.items():
            frequencies = ops.layout.constant(np.array(table.frequencies, np.float64))
            if sections is not None and ops.shape.placed:
                places = ops.inputs.rope_positions, ops.limits.max_batch_tokens
                of_pairs = ops.layout.constant(np.array(sections, np.int32))
                yield elementwise.rotation_in_sections(
                    table, *places, of_pairs, frequencies, ops.angles(rope), ops.rows
                )
            else:
                yield elementwise.rotation(table, ops.inputs.positions, frequencies, ops.angles(rope), ops.rows)

    def _rotated(self, step: ir.Rope, x: np.uint64) -> Launch:
        self.ops.is_written(step.x.name)
        return elementwise.rope(step, x, self.ops.angles(step), self.ops.rows)

    @cached_property
    def _attention(self) -> attention.AttentionLaunches:
        ops, limits, shape = self.ops, self.ops.limits, self.ops.shape
        room = attention.room_of(
            attention.attention_steps(ops.program), limits.max_batch_tokens, limits.max_context_tokens
        )
        return attention.AttentionLaunches(
            ops.gpu, room, ops.inputs, shape.rows, limits.max_sequences, shape.decode, shape.grouped
        )

    def _attention_plan(self, step: ir.Attention) -> np.uint64:
        return self.ops.layout.at(("attention", attention.likeness(step)), self._attention.room.plan_bytes)

    def _attend(self, attended: Attended) -> Iterator[Launch]:
        ops, attend, launches, wanted = self.ops, attended.attend, self._attention, attended.format
        step = attend.attention
        if not attended.rotates:
            for rope in (attend.rotate_q, attend.rotate_k):
                if rope is not None:
                    yield self._rotated(rope, ops.current[rope.x.name])
        q, *stored = (ops.current[buffer.name] for buffer in step.reads)
        k, v = (*stored, NULL, NULL)[:2]
        out = ops.out(step.out)
        by_32 = by_256 = NULL
        if wanted is not None and launches.can_quantize(step):
            at = ops.activations(wanted, step.out.name, step.out.width)
            by_32, by_256 = (at, NULL) if wanted is ActivationFormat.Q8_32 else (NULL, at)
        tables = ops.inputs.window_tables if ops.limits.gives_up(step.window) else ops.inputs.block_tables
        slopes = NULL if step.slopes is None else ops.layout.constant(np.array(step.slopes, np.float32))
        partials = ops.layout.at("partials", launches.room.partial_bytes(step))
        arrays = (q, k, v, out, tables, ops.kv[step.layer, None], slopes, self._attention_plan(step), partials)
        transform = self._head_transform(attended)
        places = attention.AttentionBuffers(*arrays, ops.vector(step.sinks), transform, by_32, by_256)
        yield from launches.step(step, places)

    def _head_transform(self, attended: Attended) -> attention.HeadTransform:
        step, rope = attended.attend.attention, attended.attend.rotate_q
        norms = {norm.x: attention.HeadNorm(self.ops.norm_weight(norm), norm.epsilon) for norm in attended.norms}
        of_heads = norms.get(step.q, attention.NO_NORM), norms.get(step.k, attention.NO_NORM)
        rotation = attention.NO_ROTATION
        if attended.rotates and rope is not None:
            rotation = attention.Rotation(self.ops.angles(rope), len(rope.table.frequencies), rope.style)
        return attention.HeadTransform(rotation, *of_heads)
