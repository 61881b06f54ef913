"""Compiles mixtures of experts that the CPU computes for another device. The parts of a plan run separately."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import Plan
from llamaclust.kernels.cpu.compile import Compiled, Compiler
from llamaclust.kernels.cpu.plan_experts import GATINGS
from llamaclust.kernels.fuse import fuse
from llamaclust.kernels.packed.weights import Weight
from llamaclust.kernels.split_experts import expert_parts, mixtures_of
from llamaclust.model import program as ir
from llamaclust.model.steps.options import Gating


@dataclass(frozen=True, slots=True)
class CompiledLines:
    """A compiled plan. For mixture i, part 2 * i chooses experts, and part 2 * i + 1 computes the expert of each line.
    A line is a row of a microbatch and one of its experts."""

    plan: Plan
    choice: int  # The buffer with the ids of each row's experts, followed by their weights.
    lines: int  # The buffer with the expert's output for each line.
    read: int  # Number of channels that mixtures read. The channels after them select a line's expert.


class _ExpertsCompiler(Compiler):
    def run_parts(self) -> Compiled:
        program = self._program
        result = self.plan.add_buffer(program.out.width, 1, False, self._limits.max_batch_tokens)
        for part in expert_parts(program):
            self.plan.begin_part()
            self.plan.read_hidden(self._buffers.write(program.hidden, private=True))
            for step in fuse(part):
                self._emit(step)
            self.plan.write_result(self._buffers.read(program.out), result)
        self.plan.set_result(result)
        return Compiled(self.plan, None)

    def run_lines(self) -> CompiledLines:
        """Compiles both parts of each mixture. A line is a row followed by a one-hot vector that selects one expert."""
        first, *_ = mixtures = mixtures_of(self._program)
        read = sum(buffer.width for buffer in first.reads)
        choice = self.plan.add_buffer(2 * first.used, 1, False, self._limits.max_batch_tokens)
        lines = self.plan.add_buffer(first.out.width, 1, False, self._limits.max_batch_tokens)
        for step in mixtures:
            hidden = self._begin(read + step.experts)
            routed = self._channels(hidden, step.x.width if step.routed else 0, (step.routed or step.x).width)
            chosen = ir.Buffer("chosen experts", 2 * step.used)
            self.plan.write_result(self._experts.choose(replace(step, x=routed, routed=None), chosen), choice)
            self.plan.write_result(self._line(step, self._begin(read + step.experts), read), lines)
        self.plan.set_result(lines)
        return CompiledLines(self.plan, choice, lines, read)

    def _line(self, step: ir.Moe, hidden: int, read: int) -> int:
        x, experts = self._channels(hidden, 0, step.x.width), self._channels(hidden, read, step.experts)
        choice = self._buffers.write(ir.Buffer("line choice", 2), private=True)
        gating = GATINGS.index(Gating.SOFTMAX_OF_CHOSEN)  # A softmax over one chosen expert gives it the weight 1.
        logits = self._buffers.read(experts)
        self.plan.choose_experts(logits, choice, step.experts, 1, gating, False, 1.0, (1, 1), None, None)
        return self._experts.lines(replace(step, x=x, used=1, routed=None), choice)

    def _begin(self, width: int) -> int:
        self.plan.begin_part()
        hidden = self._buffers.write(ir.Buffer("line", width), private=True)
        self.plan.read_hidden(hidden)
        return hidden

    def _channels(self, hidden: int, start: int, count: int) -> ir.Buffer:
        buffer = ir.Buffer(f"line channels from {start}", count)
        self.plan.copy_channels(hidden, self._buffers.write(buffer, private=True), 1, start, 0, count)
        return buffer


def compile_experts(program: ir.Program, weights: Mapping[str, Weight], limits: StageLimits) -> Compiled:
    return _ExpertsCompiler(program, weights, limits, None).run_parts()


def compile_lines(program: ir.Program, weights: Mapping[str, Weight], limits: StageLimits) -> CompiledLines:
    return _ExpertsCompiler(program, weights, limits, None).run_lines()
