"""Makes programs of stages that begin or end inside a mixture of experts, so that several workers can hold the experts
of one layer. Such a layer is divided into parts, one for each shard of its experts. The first part has the steps before
the experts, the choice of experts, and the first shard. The last part has the last shard, the sum, and the steps after
the sum. Each part sends three things to the next part: the buffers that later steps read, the choice of experts, and
the experts' results. The last part adds the results in the same order as a worker that has all experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llamaclust.core.errors import UsageError
from llamaclust.model.program import (
    Buffer,
    ExpertChoice,
    ExpertShards,
    ExpertSum,
    Moe,
    Program,
    Slice,
    Step,
    read_before_written,
)

Build = Callable[[int, int], Program]


def divided_program(build: Build, start: int, end: int, shards: int) -> Program:
    """Returns the program of parts [start, end), where each layer has `shards` parts. Raises UsageError if the program
    begins or ends in a layer with fewer than `shards` experts."""
    (first, skipped), (last, before) = divmod(start, shards), divmod(end - 1, shards)
    kept, program = before + 1, build(first, last + 1)
    steps, hidden, out, normed = program.steps, program.hidden, program.out, program.normed
    if skipped:
        hidden = _Cut.of(build, first, shards).given
    if kept < shards:
        out, normed = _Cut.of(build, last, shards).handed_on, None
    if skipped and kept < shards and first == last:
        steps = _Cut.of(build, first, shards).inside(range(skipped, kept))
    else:
        if kept < shards:
            steps = _Cut.of(build, last, shards).beginning(steps, kept)
        if skipped:
            steps = _Cut.of(build, first, shards).rest(steps, skipped)
    counts = {"start": start, "end": end, "layers": program.layers * shards, "shards": shards}
    return replace(program, hidden=hidden, out=out, steps=tuple(steps), normed=normed, **counts)


def mixture_of(steps: Sequence[Step], layer: int) -> Moe | None:
    mixtures = (step for step in steps if isinstance(step, Moe))
    return next((step for step in mixtures if step.layer == layer), None)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A layer that is divided at its experts. `carried` lists the buffers written before the experts and read later."""

    mixture: Moe
    carried: tuple[Buffer, ...]
    shards: int

    @classmethod
    def of(cls, build: Build, layer: int, shards: int) -> _Cut:
        program = build(layer, layer + 1)
        mixture = mixture_of(program.steps, layer)
        if mixture is None:
            raise UsageError(f"layer {layer} has no experts, so a stage cannot begin or end in it")
        if mixture.experts < shards:
            raise UsageError(f"layer {layer} has {mixture.experts} experts, too few for {shards} shards")
        behind = program.steps[program.steps.index(mixture) + 1 :]
        carried = read_before_written((replace(mixture, routed=None), *behind), program.out, program.normed)
        return cls(mixture, carried, shards)

    @property
    def choice(self) -> Buffer:
        return Buffer("expert choice", 2 * self.mixture.used)

    @property
    def results(self) -> Buffer:
        return Buffer("expert results", self.mixture.used * self.mixture.out.width)

    @property
    def width(self) -> int:
        return sum(buffer.width for buffer in (*self.carried, self.choice, self.results))

    @property
    def given(self) -> Buffer:
        return Buffer("cut in", self.width)

    @property
    def handed_on(self) -> Buffer:
        return Buffer("cut out", self.width)

    def beginning(self, steps: Sequence[Step], kept: int) -> tuple[Step, ...]:
        computed = replace(self._shards(range(kept)), out=self.handed_on, carried=self.carried)
        return *steps[: steps.index(self.mixture)], ExpertChoice(self.mixture, self.choice), computed

    def inside(self, numbers: range) -> tuple[Step, ...]:
        computed = replace(self._shards(numbers), given=self.given, out=self.handed_on, carried=self.carried)
        return *self._taken(), computed

    def rest(self, steps: Sequence[Step], skipped: int) -> tuple[Step, ...]:
        computed = replace(self._shards(range(skipped, self.shards)), given=self.given)
        total = ExpertSum(self.mixture, self.choice, self.results)
        return *self._taken(), computed, total, *steps[steps.index(self.mixture) + 1 :]

    def _shards(self, numbers: range) -> ExpertShards:
        bounds = [number * self.mixture.experts // self.shards for number in range(self.shards + 1)]
        held = tuple(range(bounds[number], bounds[number + 1]) for number in numbers)
        return ExpertShards(self.mixture, self.choice, self.results, held)

    def _taken(self) -> list[Step]:
        taken: list[Step] = []
        for buffer in (*self.carried, self.choice):
            taken.append(Slice(self.given, buffer, sum(step.out.width for step in taken if isinstance(step, Slice))))
        return taken
