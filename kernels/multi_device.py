"""Runs the layers of one stage on several devices of a worker, one device after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import Gatherer, PythonGatherer
from llamaclust.kernels.backend import (
    Backend,
    Batch,
    Float32,
    GathersRows,
    Int32,
    Progress,
    RankedLogits,
    RanksLogits,
    Stage,
)
from llamaclust.kernels.gathers import bands_of, borders_in
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import Attention, Buffer, Gather, Join, Program, Slice, Step


@dataclass(frozen=True, slots=True)
class BackendLayers:
    backend: Backend
    start: int
    end: int


class MultiDeviceBackend:
    """Joins `parts`, in the order of their layers, into one backend. Each part has the KV memory of its own layers."""

    def __init__(self, parts: Sequence[BackendLayers]) -> None:
        assert parts and all(part.end == after.start for part, after in pairwise(parts)), parts
        (self.numerics_version,) = {part.backend.numerics_version for part in parts}
        self.name = "+".join(part.backend.name for part in parts)
        self.feature_level = "+".join(part.backend.feature_level for part in parts)
        self.parts = tuple(parts)

    def load(
        self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress
    ) -> MultiDeviceStage:
        stages: list[Stage] = []
        with ExitStack() as loaded:
            for part, own in self._programs(program):
                stages.append(part.backend.load(own, tensors, limits, progress))
                loaded.callback(stages[-1].close)
            loaded.pop_all()
        return MultiDeviceStage(stages, [own for _, own in self._programs(program)])

    def held_bytes(self, program: Program, tensors: Mapping[str, Tensor]) -> int:
        return sum(part.backend.held_bytes(own, tensors) for part, own in self._programs(program))

    def workspace_bytes(self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
        return sum(part.backend.workspace_bytes(own, tensors, limits) for part, own in self._programs(program))

    def _programs(self, program: Program) -> Iterator[tuple[BackendLayers, Program]]:
        assert (program.start, program.end) == (self.parts[0].start, self.parts[-1].end), "another stage's parts"
        for part in self.parts:
            yield part, layers_of(program, part.start, part.end)


class MultiDeviceStage:
    def __init__(self, stages: Sequence[Stage], programs: Sequence[Program]) -> None:
        self.stages = tuple(stages)
        self._programs = tuple(programs)
        self._rows, self._has_groups = 0, False  # Values for the current run.
        # Pairs of a part's gatherer and the whole stage's gatherer.
        self._gatherers: list[tuple[Gatherer, Gatherer]] = []
        self.weight_bytes = sum(stage.weight_bytes for stage in stages)
        self.kv_bytes = sum(stage.kv_bytes for stage in stages)
        self.workspace_bytes = sum(stage.workspace_bytes for stage in stages)

    @property
    def weights(self) -> object:
        return [stage.weights for stage in self.stages]

    def run(self, batch: Batch, hidden: Float32 | None) -> Float32:
        self._begin(batch)
        for stage in self.stages:
            hidden = stage.run(batch, hidden)
        assert hidden is not None
        return hidden

    @property
    def ranks_logits(self) -> bool:
        last = self.stages[-1]
        return isinstance(last, RanksLogits) and last.ranks_logits

    def run_ranked(self, batch: Batch, hidden: Float32 | None) -> RankedLogits:
        self._begin(batch)
        *others, last = self.stages
        for stage in others:
            hidden = stage.run(batch, hidden)
        assert isinstance(last, RanksLogits)
        return last.run_ranked(batch, hidden)

    def _begin(self, batch: Batch) -> None:
        self._rows, self._has_groups = batch.rows, batch.groups is not None
        for own, whole in self._gatherers:
            own.bands = whole.bands

    def gather_by(self, gatherer: Gatherer) -> None:
        first, self._gatherers = 0, []
        for stage, program in zip(self.stages, self._programs, strict=True):
            assert isinstance(stage, GathersRows), "experts in RAM are refused in groups"
            own = self._numbered(gatherer, first, program)
            stage.gather_by(own)
            self._gatherers.append((own, gatherer))
            first += sum(isinstance(step, Gather) for step in program.steps)

    def _numbered(self, gatherer: Gatherer, first: int, program: Program) -> PythonGatherer:
        """Returns a gatherer that numbers a part's gathers from `first`, so that all members number them alike."""
        gathers = [step for step in program.steps if isinstance(step, Gather)]

        def gather(number: int, own: Float32, whole: Float32) -> None:
            bands = bands_of(program, self._rows, 1 if self._has_groups else gatherer.bands)
            step = gathers[number // bands]
            gatherer.gather(first * bands + number, own, whole, borders_in(step, whole.shape[1]), step.to)

        return PythonGatherer(gather)

    def normed(self, rows: Int32) -> Float32:
        return self.stages[-1].normed(rows)

    def close(self) -> None:
        for stage in self.stages:
            stage.close()
        self.stages, self._gatherers = (), []  # A gatherer refers to this stage, in a cycle that Python cannot see.


def layers_of(program: Program, start: int, end: int) -> Program:
    """Returns layers [start, end) as a program. The first layer includes the embedding, and the last layer the head."""
    assert program.start <= start < end <= program.end, (start, end)
    bounds = {program.start: 0, program.end: len(program.steps)}
    for at, step in enumerate(program.steps):
        layer = _layer(step)
        if layer is not None and layer > program.start:
            bounds.setdefault(layer, at)
    given, sent = (_Carried.before(program, bounds[layer]) for layer in (start, end))
    steps = program.steps[bounds[start] : bounds[end]]
    hidden, out, normed = program.hidden, program.out, program.normed
    if start > program.start and given is not None:
        hidden, steps = given.whole("given"), given.unpacked(steps)
    if end < program.end:
        out, normed = (program.hidden, None) if sent is None else (sent.whole("sent"), None)
        steps = steps if sent is None else (*steps, *sent.packed(0 if given is None else given.start))
    return replace(program, start=start, end=end, hidden=hidden, out=out, steps=steps, normed=normed)


@dataclass(frozen=True, slots=True)
class _Carried:
    """The row that a device passes to the next: the hidden state, followed by channels that later layers read."""

    hidden: Buffer
    further: Buffer
    start: int

    @classmethod
    def before(cls, program: Program, index: int) -> _Carried | None:
        """Returns the row to pass to the steps from `index` on, or None if they need only the hidden state."""
        # `slices` maps a buffer to the start of its first slice.
        whole, slices, written = set[Buffer](), dict[Buffer, int](), set[str]()
        for step in program.steps[index:]:
            for buffer in step.reads:
                if buffer.name in written:
                    continue
                if isinstance(step, Slice) and step.heads == 1:
                    slices[buffer] = min(step.start, slices.get(buffer, step.start))
                else:
                    whole.add(buffer)
            written.add(step.out.name)
        if len(whole) != 1 or len(slices) != 1 or whole == slices.keys():
            return None
        (hidden,), ((further, start),) = whole, slices.items()
        return cls(hidden, further, start)

    def whole(self, name: str) -> Buffer:
        return Buffer(name, self.hidden.width + self.further.width - self.start)

    def packed(self, first: int) -> tuple[Step, Step]:
        have, rest = self._from(first), Buffer("further inputs", self.further.width - self.start)
        return Slice(have, rest, self.start - first), Join(self.hidden, rest, self.whole("sent"))

    def unpacked(self, steps: Iterable[Step]) -> tuple[Step, ...]:
        given, own = self.whole("given"), self._from(self.start)
        moved = (
            replace(step, x=own, start=step.start - self.start)
            if isinstance(step, Slice) and step.x == self.further
            else step
            for step in steps
        )
        return Slice(given, self.hidden, 0), Slice(given, own, self.hidden.width), *moved

    def _from(self, first: int) -> Buffer:
        return Buffer(self.further.name, self.further.width - first)


def _layer(step: Step) -> int | None:
    if isinstance(step, Attention):
        return step.layer
    parts = str(getattr(step, "weight", None) or getattr(step, "router", "")).split(".")
    return int(parts[1]) if parts[0] == "blk" else None
