"""Members of a group: in threads that gather at a barrier or over links, or in processes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket
from threading import Barrier

import numpy as np

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import PythonGatherer
from llamaclust.kernels.backend import Backend, Batch, Float32, GathersRows, Stage
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.groups.division import divide
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import Program
from support.arithmetic.batches import LIMITS
from support.arithmetic.linked import linked, links_of, meshed

_DEADLINE_S = 60.0


class Meeting:
    """Gathers of members at a barrier; raises BrokenBarrierError if a member does not arrive."""

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


class Group:
    """All members of a group, each with its own stage on one of the backends."""

    def __init__(
        self,
        model: Model,
        program: Program,
        shares: Sequence[float],
        backends: Sequence[Backend],
        limits: StageLimits = LIMITS,
    ) -> None:
        self.meeting = Meeting(len(shares))
        self.stages: list[Stage] = []
        for member, backend in enumerate(backends):
            part = divide(program, shares, member)
            stage = backend.load(part, model.tensors_for(part), limits, lambda done_bytes: None)
            assert isinstance(stage, GathersRows)
            stage.gather_by(self.meeting.gatherer(member))
            self.stages.append(stage)

    def run(self, batch: Batch, hidden: Float32 | None) -> list[Float32]:
        """Returns each member's result; the first member, or each one with a Meeting, has all logits."""
        with ThreadPoolExecutor(len(self.stages)) as pool:
            return list(pool.map(lambda stage: stage.run(batch, hidden).copy(), self.stages))

    def close(self) -> None:
        for stage in self.stages:
            stage.close()


class CpuGroup(Group):
    """A group on CPU backends of `threads` threads each."""

    def __init__(
        self, model: Model, program: Program, shares: Sequence[float], threads: int, limits: StageLimits = LIMITS
    ) -> None:
        super().__init__(model, program, shares, [CpuBackend(threads, yields=False) for _ in shares], limits)


class LinkedGroup(CpuGroup):
    """A CPU group whose members gather over sockets."""

    def __init__(
        self, model: Model, program: Program, shares: Sequence[float], threads: int, limits: StageLimits = LIMITS
    ) -> None:
        super().__init__(model, program, shares, threads, limits)
        self.links = linked(len(shares))
        self._step = 0
        for stage, links in zip(self.stages, self.links, strict=True):
            assert isinstance(stage, GathersRows)
            stage.gather_by(links)

    def run(self, batch: Batch, hidden: Float32 | None) -> list[Float32]:
        self._step += 1
        for links in self.links:
            links.begin(1, self._step)
        return super().run(batch, hidden)


def run_in_processes(path: Path, shares: Sequence[float], batches: Sequence[Batch]) -> list[list[bytes]]:
    """Returns the result bytes of each member for each batch; every member of the group is a process."""
    spawn, found = get_context("spawn"), []
    for member, ends in enumerate(meshed(len(shares))):
        ours, theirs = spawn.Pipe(duplex=False)
        arguments = path, shares, member, ends, batches, theirs
        process = spawn.Process(target=_run_member, args=arguments, daemon=True)
        process.start()
        theirs.close()
        for end in ends:
            if end is not None:
                end.close()
        found.append((process, ours))
    results = [ours.recv() for _, ours in found]
    for process, _ in found:
        process.join(_DEADLINE_S)
    return results


def _run_member(
    path: Path,
    shares: Sequence[float],
    member: int,
    ends: Sequence[socket | None],
    batches: Sequence[Batch],
    results: Connection,
) -> None:
    links, found = links_of(member, ends), list[bytes]()
    with Model.open(path) as model:
        whole = model.program(0, model.layer_count, KvType.F16, LIMITS.max_context_tokens, 1)
        program = divide(whole, shares, member)
        stage = CpuBackend(1).load(program, model.tensors_for(program), LIMITS, lambda done_bytes: None)
    stage.gather_by(links)
    for step, batch in enumerate(batches):
        links.begin(1, step)
        found.append(stage.run(batch, None).tobytes())
    results.send(found)
