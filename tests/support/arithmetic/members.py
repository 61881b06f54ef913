"""Members of a group on the CPU backend in threads of one process, which gather at a barrier."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import PythonGatherer
from llamaclust.kernels.backend import Batch, Float32
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage
from llamaclust.model.groups.division import divide
from llamaclust.model.loader import Model
from llamaclust.model.program import Program
from support.arithmetic.batches import LIMITS

_DEADLINE_S = 60.0


class Meeting:
    """Gathers of members that are at the same one: BrokenBarrierError where one is not."""

    def __init__(self, members: int) -> None:
        self.gathers = [0] * members
        self._rows: list[Float32 | None] = [None] * members
        self._numbers = [-1] * members
        self._barrier = Barrier(members, timeout=_DEADLINE_S)

    def gatherer(self, member: int) -> PythonGatherer:
        def gather(number: int, own: Float32, whole: Float32) -> None:
            self.gathers[member] += 1
            self._rows[member], self._numbers[member] = own, number
            self._barrier.wait()
            assert len({*self._numbers}) == 1
            np.concatenate([rows for rows in self._rows if rows is not None], axis=1, out=whole)
            self._barrier.wait()

        return PythonGatherer(gather)


class CpuGroup:
    """All members of a group, each with a stage of its own."""

    def __init__(
        self, model: Model, program: Program, shares: Sequence[float], threads: int, limits: StageLimits = LIMITS
    ) -> None:
        self.meeting = Meeting(len(shares))
        self.stages: list[CpuStage] = []
        for member in range(len(shares)):
            part = divide(program, shares, member)
            backend = CpuBackend(threads, yields=False)
            self.stages.append(backend.load(part, model.tensors_for(part), limits, lambda done_bytes: None))
            self.stages[-1].gather_by(self.meeting.gatherer(member))

    def run(self, batch: Batch, hidden: Float32 | None) -> list[Float32]:
        """Each member's result; all have the whole rows."""
        with ThreadPoolExecutor(len(self.stages)) as pool:
            return list(pool.map(lambda stage: stage.run(batch, hidden).copy(), self.stages))
