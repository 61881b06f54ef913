from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llamaclust.kernels._native import PackedMatrix, Plan
from llamaclust.kernels.backend import Float32
from llamaclust.kernels.cpu.buffers import Buffers
from llamaclust.kernels.packed.weights import Weight
from llamaclust.model import program as ir
from llamaclust.model.quant_types import QuantType
from llamaclust.model.shard_names import shard_name
from llamaclust.model.steps.options import SWIGLU_LIMIT, ActivationFunction, GatedActivation, Gating

GATINGS = tuple(Gating)
"""The gatings, in the order of their numbers in the native enum."""


@dataclass(frozen=True, slots=True)
class PlanExperts:
    plan: Plan
    buffers: Buffers
    weights: Mapping[str, Weight]
    quantize: Callable[[ir.Buffer, Sequence[QuantType]], list[int]]  # Returns a slot for each of the weight types.
    observe: Callable[[Sequence[str], ir.Buffer, int | None, int], None]
    copy: Callable[[int, int], int] | None  # Copies a buffer. None if the stage keeps no inputs.

    def emit(self, step: ir.Moe | ir.MixtureStep) -> None:
        match step:
            case ir.Moe():
                choice = self.choose(step, ir.Buffer("chosen experts", 2 * step.used))
                chosen = None if self.copy is None else self.copy(choice, 2 * step.used)
                results = _Experts(self, step, None, chosen).compute(choice)
                self._sum(step, choice, results)
            case ir.ExpertChoice():
                self.choose(step.mixture, step.out)
            case ir.ExpertInner(mixture):
                line = ir.Buffer(step.out.name, mixture.ffn_width)
                _Experts(self, mixture, None, None).activate(self.buffers.read(step.choice), line)
            case ir.ExpertDown(mixture):
                lines = ir.Buffer(step.x.name, mixture.ffn_width), ir.Buffer(step.out.name, mixture.out.width)
                _Experts(self, mixture, None, None).reduce(self.buffers.read(step.choice), *lines)
            case ir.ExpertShards():
                choice = self.buffers.read(step.choice)
                self._place(step, choice, _Experts(self, step.mixture, step.shards, None).compute(choice))
            case ir.ExpertSum():
                self._sum(step.mixture, self.buffers.read(step.choice), self.buffers.read(step.x))

    def vector(self, name: str | None) -> Float32 | None:
        return None if name is None else self.weights[name].vector

    def lines(self, step: ir.Moe, choice: int) -> int:
        return _Experts(self, step, None, None).compute(choice)

    def choose(self, step: ir.Moe, out: ir.Buffer) -> int:
        buffers, router, routed = self.buffers, self.weights[step.router], step.routed or step.x
        self.observe([step.router], routed, None, 1)
        logits = buffers.write(ir.Buffer("router logits", step.experts))
        (slot,) = self.quantize(routed, [router.quant_type])
        self.plan.multiply([(router.matrix, self.vector(step.router_bias), logits, slot)])
        choice = buffers.write(out, private=True)
        self.plan.choose_experts(
            logits,
            choice,
            step.experts,
            step.used,
            GATINGS.index(step.options.gating),
            step.options.normalized,
            step.options.scale,
            (step.options.groups, step.options.used_groups),
            self.vector(step.selection_bias),
            self.vector(step.expert_scales),
        )
        return choice

    def _sum(self, step: ir.Moe, choice: int, results: int) -> None:
        out = self.buffers.write(step.out, private=True)
        self.plan.combine_experts(choice, results, out, step.used, not step.options.weighs_inputs)

    def _place(self, step: ir.ExpertShards, choice: int, results: int) -> None:
        """Merges this worker's expert results with earlier workers' results. Adds buffers that a later stage reads."""
        buffers, used, start = self.buffers, step.mixture.used, 0
        given = None if step.given is None else (buffers.read(step.given), step.given.width - step.results_width)
        if step.carried is None:
            out = buffers.write(ir.Buffer(step.out.name, step.mixture.out.width), used, private=True)
        else:
            sources = [(buffers.read(buffer), buffer.width) for buffer in (*step.carried, step.choice)]
            out = buffers.write(step.out)
            for source, width in sources:
                self.plan.copy_channels(source, out, 1, 0, start, width)
                start += width
        self.plan.place_experts(choice, results, given, out, start, used, (step.experts.start, step.experts.stop))


@dataclass(frozen=True, slots=True)
class _Experts:
    plan_experts: PlanExperts
    step: ir.Moe
    shards: tuple[range, ...] | None
    chosen: int | None

    def compute(self, choice: int) -> int:
        step = self.step
        result, down = ir.Buffer("expert activated", step.ffn_width), ir.Buffer("expert down", step.out.width)
        self.activate(choice, result)
        return self.reduce(choice, result, down)

    def activate(self, choice: int, result: ir.Buffer) -> None:
        step, buffers, used, inputs = self.step, self.plan_experts.buffers, self.step.used, self.step.x
        if weighed := step.options.weighs_inputs:
            inputs = ir.Buffer("expert inputs", step.x.width)
            x = buffers.read(step.x)
            self.plan_experts.plan.weigh_inputs(choice, x, buffers.write(inputs, used, private=True), used)
        self.plan_experts.observe(step.inner, inputs, self.chosen, used if weighed else 1)
        parts = [ir.Buffer(f"expert {part}", step.inner_width) for part, _ in enumerate(step.inner)]
        self._multiply(inputs, list(zip(step.inner, parts, strict=True)), choice, per_rank=weighed)
        inner = [self._add_bias(part, bias, choice) for part, bias in zip(parts, step.inner_biases, strict=True)]
        self._activate(self._halves(inner[0]) if step.fused else inner, result)

    def reduce(self, choice: int, x: ir.Buffer, down: ir.Buffer) -> int:
        self.plan_experts.observe([self.step.down], x, self.chosen, self.step.used)
        self._multiply(x, [(self.step.down, down)], choice, per_rank=True)
        return self._add_bias(down, self.step.down_bias, choice)

    def _halves(self, x: int) -> list[int]:
        step, experts = self.step, self.plan_experts
        parts = [ir.Buffer(f"expert {name}", step.ffn_width) for name in ("gate", "up")]
        halves = [experts.buffers.write(part, step.used, private=True) for part in parts]
        for number, half in enumerate(halves):
            experts.plan.copy_channels(x, half, 1, number * step.ffn_width, 0, step.ffn_width)
        return halves

    def _activate(self, inner: Sequence[int], result: ir.Buffer) -> None:
        plan, activation = self.plan_experts.plan, self.step.options.activation
        activated = self.plan_experts.buffers.write(result, self.step.used, private=True)
        if activation is GatedActivation.GELU_MUL:
            plan.elementwise(ActivationFunction.GELU_TANH, inner[0], inner[0], activated, 0)
            plan.elementwise("mul", activated, inner[1], activated, 0)
        else:
            limit = SWIGLU_LIMIT if activation is GatedActivation.CLAMPED_SWIGLU else 0
            plan.elementwise(activation, inner[0], inner[-1], activated, limit)

    def _add_bias(self, x: ir.Buffer, bias: str | None, choice: int) -> int:
        product = self.plan_experts.buffers.read(x)
        if bias is None:
            return product
        biased = self.plan_experts.buffers.write(x, self.step.used, private=True)
        for first, weight in self._held(bias):
            row = choice, product, biased, weight.matrix, self.step.used
            self.plan_experts.plan.add_expert_rows(*row, *([first] if first else []))
        return biased

    def _held(self, name: str) -> list[tuple[int, Weight]]:
        weights = self.plan_experts.weights
        if self.shards is None:
            return [(0, weights[name])]
        return [(shard.start, weights[shard_name(name, shard)]) for shard in self.shards]

    def _multiply(
        self, x: ir.Buffer, products: Sequence[tuple[str, ir.Buffer]], choice: int, *, per_rank: bool
    ) -> None:
        experts, used, first = self.plan_experts, self.step.used, None if self.shards is None else self.shards[0].start
        held = [[weight for _, weight in self._held(name)] for name, _ in products]
        slots = experts.quantize(x, [weights[0].quant_type for weights in held])
        outs = [experts.buffers.write(out, used) for _, out in products]
        for slot in dict.fromkeys(slots):
            chosen: list[tuple[list[PackedMatrix], int]] = [
                ([matrix for weight in weights for matrix in weight.matrices], out)
                for weights, out, its_slot in zip(held, outs, slots, strict=True)
                if its_slot == slot
            ]
            experts.plan.multiply_experts(chosen, choice, slot, used, per_rank, *([] if first is None else [first]))
