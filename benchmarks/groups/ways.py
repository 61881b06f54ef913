"""Clusters that serve one model in different ways: one worker, stages, a group; each process on a core of its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "clusters"))

from emulation import Emulation
from measuring.placement import pin_process
from running import Bench, Layout, running

from llamaclust.core.errors import LlamaclustError

_LOOKS, _LOOK_S = 600, 0.1
_COMMAND = (sys.executable, "-P", "-m", "llamaclust")


@dataclass(frozen=True, slots=True)
class Way:
    """`cores` and `speeds` are those of the workers, the first one first."""

    name: str
    cores: tuple[int, ...]
    shares: tuple[int, ...] = ()  # of a group
    speeds: tuple[float, ...] = (1.0,)

    def plan(self, layers: int) -> list[dict[str, Any]]:
        names = Layout(workers=len(self.cores)).names
        if self.shares:
            return [{"workers": [*names], "layers": [0, layers], "shares": [*self.shares]}]
        borders = [layers * number // len(names) for number in range(len(names) + 1)]
        return [{"worker": name, "layers": [*pair]} for name, pair in zip(names, pairwise(borders), strict=True)]


@dataclass(frozen=True, slots=True)
class Reading:
    """Milliseconds since the start, prompts included: what the stages computed, the leader's waits in gathers, and the
    processor time of each process, the coordinator first."""

    compute_ms: float
    gathers_ms: float
    processor_ms: tuple[float, ...]

    def since(self, before: Reading, tokens: int) -> Reading:
        """Processor time of each process for one of so many tokens."""
        pairs = zip(self.processor_ms, before.processor_ms, strict=True)
        return Reading(
            (self.compute_ms - before.compute_ms) / tokens,
            (self.gathers_ms - before.gathers_ms) / tokens,
            tuple((now - then) / tokens for now, then in pairs),
        )


@dataclass(frozen=True, slots=True)
class ServedWay:
    """A cluster that runs."""

    way: Way
    bench: Bench
    pids: tuple[int, ...]  # of the coordinator, then of the workers in their order

    async def reading(self) -> Reading:
        """Processor times first: waiting for the rest takes some."""
        processor_ms = tuple(map(_processor_ms, self.pids))
        found = await self._settled()
        return Reading(
            sum(stage["compute_ms"] * stage["microbatches"] for stage in found["stages"]),
            sum(1e3 * group["waited_s"] for group in found["status"]["groups"]),
            processor_ms,
        )

    async def _settled(self) -> dict[str, Any]:
        """When heartbeats have brought the counters of all steps. LlamaclustError if they do not."""
        for _ in range(_LOOKS):
            found = await self.bench.cluster()
            beats = {worker["name"]: worker["heartbeat"] for worker in found["status"]["workers"]}
            steps = {stage["worker"]: stage["microbatches"] for stage in found["stages"]}
            if all(beats[name] is not None and beats[name]["microbatches"] >= count for name, count in steps.items()):
                return found
            await asyncio.sleep(_LOOK_S)
        raise LlamaclustError(f"{self.way.name}: no heartbeat tells of the last step")


def _processor_ms(pid: int) -> float:
    """Processor time of the threads that the process has now, to the nanosecond."""
    times = (each.read_text().split()[0] for each in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(map(int, times)) / 1e6


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings that all clusters of a run share. Without an emulation, workers are processes of the coordinator."""

    coordinator_core: int
    context: int
    emulation: Emulation | None
    keys: Mapping[str, Any] = field(default_factory=dict)

    def layout(self, way: Way, layers: int) -> Layout:
        keys = {"plan": way.plan(layers), "context_length": self.context, **self.keys}
        if self.emulation is None:
            return Layout(workers=len(way.cores), keys=keys)
        names = Layout(workers=len(way.cores)).names
        places = zip(names, way.cores, way.speeds, strict=True)
        prefixes = {name: self.emulation.prefix(core, speed) for name, core, speed in places}
        return Layout(launcher="static", workers=len(names), keys=keys, prefixes=prefixes, is_secure=True)

    @asynccontextmanager
    async def serving(self, way: Way, model: Path, layers: int) -> AsyncIterator[ServedWay]:
        command = ("taskset", "-c", str(self.coordinator_core), *_COMMAND)
        async with running(model, self.layout(way, layers), command) as (bench, coordinator):
            workers = {worker["name"]: worker for worker in (await bench.status())["workers"]}
            pids = [workers[name]["pid"] for name in sorted(workers)]
            if len(pids) != len(way.cores):
                raise LlamaclustError(f"{len(pids)} of {len(way.cores)} workers serve")
            for pid, core in zip(pids, way.cores, strict=True):
                pin_process(pid, core)
            yield ServedWay(way, bench, (coordinator.pid, *pids))


def ways_of(cores: Sequence[int], shares: Sequence[int], speeds: Sequence[float]) -> list[Way]:
    """One worker as fast as the fastest one, a stage on each core, unless they differ, and a group."""
    found = [Way("one worker", (cores[0],), speeds=(max(speeds),))]
    if len(set(speeds)) == 1:
        found.append(Way("stages", tuple(cores), speeds=tuple(speeds)))
    return [*found, Way("group", tuple(cores), tuple(shares), tuple(speeds))]
