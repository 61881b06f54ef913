from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llamaclust.kernels.cuda.executor.operands import Operands
from llamaclust.kernels.cuda.launches import elementwise, experts, matmul
from llamaclust.kernels.cuda.launches.inputs import RowCount
from llamaclust.kernels.cuda.runtime.device import NULL, Launch
from llamaclust.model.program import Moe
from llamaclust.model.quant_types import TILE_ROWS, ActivationFormat, QuantType
from llamaclust.model.steps.options import GatedActivation

_FLOAT = 4


@dataclass(frozen=True, slots=True)
class _Product:
    weight: str
    bias: str | None
    out: np.uint64


@dataclass(frozen=True, slots=True)
class ExpertsEmitter:
    ops: Operands
    step: Moe

    def launches(self) -> Iterator[Launch]:
        step, ops, rows = self.step, self.ops, self.ops.rows
        yield from self._choose()
        piece = matmul.expert_piece(rows.bucket * step.used, step.experts)
        yield experts.group(step, self._chosen, piece, rows)
        yield from self._dequantize_biases()
        down = ops.scratch("expert down", step.out.width, step.used)
        yield from self.line_products(piece, down)
        yield experts.combine(step, down, self._chosen, ops.out(step.out), rows)

    def line_products(self, piece: int, out: np.uint64) -> Iterator[Launch]:
        step, inner = self.step, self._inner
        yield from self._multiply_inputs(inner, piece)
        yield from self._activated(inner)
        down = _Product(step.down, step.down_bias, out)
        yield from self._products((down,), self._activations, self._lines(piece, 1))

    def _multiply_inputs(self, inner: Sequence[_Product], piece: int) -> Iterator[Launch]:
        step, ops, names = self.step, self.ops, [product.weight for product in inner]
        if not step.options.weighs_inputs:
            yield from ops.quantize(step.x, names)
            yield from self._products(inner, ops.current[step.x.name], self._lines(piece, step.used))
            return
        name, width = "expert inputs", step.x.width
        weighed = ops.scratch(name, width, step.used)
        yield experts.weigh_inputs(step, ops.current[step.x.name], self._chosen, weighed, ops.rows)
        for kind in dict.fromkeys(ops.weights[weight].activation for weight in names):
            if kind is not ActivationFormat.F32:
                out = ops.activations(kind, name, width, step.used)
                yield matmul.quantize(kind, weighed, width, ops.rows.times(step.used), out)
        yield from self._products(inner, weighed, self._lines(piece, 1))

    def _choose(self) -> Iterator[Launch]:
        step, ops, router = self.step, self.ops, self.ops.weights[self.step.router]
        routed = step.routed or step.x
        yield from ops.quantize(routed, [step.router])
        logits = ops.scratch("router logits", step.experts)
        product = matmul.Product(router, ops.vector(step.router_bias), logits)
        yield matmul.multiply([product], ops.activation_of(router, ops.current[routed.name]), ops.rows, ops.gpu)
        output = experts.RouterOutput(logits, ops.vector(step.selection_bias), ops.vector(step.expert_scales))
        yield experts.choose(step, output, self._chosen, ops.rows)

    @property
    def _chosen(self) -> experts.ExpertBuffers:
        at, lines = self.ops.layout.at, experts.choice_bytes(self.step, self.ops.room)
        names = ("expert ids", "expert weights", "expert lines")
        items = at("expert items", experts.items_bytes(self.step, self.ops.room, matmul.LEAST_PIECE))
        ids, weights, ordered = (at(name, lines) for name in names)
        return experts.ExpertBuffers(ids, weights, ordered, items, at("expert count", 4))

    @property
    def _inner(self) -> tuple[_Product, ...]:
        step = self.step
        outs = (self.ops.scratch(f"expert {place}", step.inner_width, step.used) for place in range(len(step.inner)))
        return tuple(map(_Product, step.inner, step.inner_biases, outs))

    def _activated(self, inner: Sequence[_Product]) -> Iterator[Launch]:
        step, ops = self.step, self.ops
        lines, kind, out = ops.rows.times(step.used), ops.weights[step.down].activation, self._activations
        gate, up = inner[0].out, inner[-1].out
        if step.gate is None and not step.fused:
            to = out if kind is ActivationFormat.F32 else up
            yield elementwise.elementwise(step.options.activation, (up,), to, step.used * step.ffn_width, ops.rows)
            if kind is not ActivationFormat.F32:
                yield matmul.quantize(kind, up, step.ffn_width, lines, out)
            return
        if step.fused:
            up = gate + np.uint64(_FLOAT * step.ffn_width)
        kernel = elementwise.gated_kernel(GatedActivation(step.options.activation))
        inputs = elementwise.GatedInputs(kernel, gate, up, step.inner_width)
        if kind is ActivationFormat.F32:
            yield elementwise.gated_lines(inputs, step.ffn_width, lines, out)
        else:
            yield matmul.quantize_gated(kind, inputs, step.ffn_width, lines, out)

    @property
    def _activations(self) -> np.uint64:
        step, ops, name = self.step, self.ops, "expert activations"
        kind = ops.weights[step.down].activation
        if kind is ActivationFormat.F32:
            return ops.scratch(name, step.ffn_width, step.used)
        return ops.activations(kind, name, step.ffn_width, step.used)

    def _lines(self, piece: int, divisor: int) -> matmul.Experts:
        chosen, most_items = self._chosen, experts.max_items(self.step, self.ops.rows.bucket, piece)
        return matmul.Experts(
            chosen.items, chosen.item_count, chosen.lines, most_items, piece, divisor, self._bias_rows
        )

    def _products(self, products: Sequence[_Product], x: np.uint64, lines: matmul.Experts) -> Iterator[Launch]:
        ops = self.ops
        alike: dict[QuantType, list[matmul.Product]] = {}
        for product in products:
            weights = ops.weights[product.weight]
            alike.setdefault(weights.quant_type, []).append(
                matmul.Product(weights, self._bias(product.bias), product.out)
            )
        for group in alike.values():
            yield matmul.multiply_experts(group, ops.activation_of(group[0].weights, x), lines, ops.gpu)

    @property
    def _bias_rows(self) -> int:
        is_plain = all(self.ops.weights[name].quant_type is QuantType.F32 for name in self.step.biases)
        return TILE_ROWS if self.step.biases and is_plain else 1

    def _bias(self, name: str | None) -> np.uint64:
        if name is None:
            return NULL
        weights = self.ops.weights[name]
        if self._bias_rows == TILE_ROWS:
            return weights.address
        return self.ops.layout.at(("expert bias", self.step.biases.index(name)), _FLOAT * weights.rows * weights.cols)

    def _dequantize_biases(self) -> Iterator[Launch]:
        constant, count = self.ops.layout.constant, self.step.experts
        if self._bias_rows == TILE_ROWS or not self.step.biases:
            return
        every = constant(np.arange(count, dtype=np.int32))
        rows = RowCount(count, constant(np.array([count], np.int32)))
        for name in self.step.biases:
            yield matmul.embed(self.ops.weights[name], every, rows, self._bias(name))
