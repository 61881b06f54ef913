"""A member of a group: `group.py` starts it, and says by a JSON line each on standard input what it is and what to run.

python benchmarks/groups/member.py < LINES      (a `Setting`, the members' ports, then a `Run` as often as wanted)
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from links import Links

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import PythonGatherer
from llamaclust.kernels.backend import Batch, Float32
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage
from llamaclust.kernels.gathers import gather_formats, packed_width
from llamaclust.model.groups.division import divide
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS, Gather, Program

CONTEXT = 512
FIRST_TOKEN = 1
WARM = 2
"""Tokens before those that are measured."""
_BLOCKS = CONTEXT // KV_BLOCK_TOKENS
_LIMITS = StageLimits(1, 1, 1, CONTEXT, _BLOCKS)


@dataclass(frozen=True, slots=True)
class Setting:
    """`spins`: it has its core for itself; `speed`: below 1, it waits before each gather, as a slower machine would. A
    member that is alone computes the whole model."""

    folder: str
    hosts: list[str]
    member: int
    model: str
    shares: tuple[float, ...]
    core: int
    spins: bool
    speed: float

    def programs(self, model: Model) -> list[Program]:
        """This member's, of all layers but the last and of that one with the head."""
        bounds = (0, model.layer_count - 1), (model.layer_count - 1, model.layer_count)
        programs = [model.program(*each, KvType.F16, CONTEXT, 1) for each in bounds]
        return programs if len(self.shares) == 1 else [divide(each, self.shares, self.member) for each in programs]


@dataclass(frozen=True, slots=True)
class Run:
    """So many tokens, from an empty context; `digest`: of all logits."""

    tokens: int
    round_trip_ms: float = 0
    gbit_s: float = 0
    digest: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """Mean nanoseconds of a token: in all layers but the last, and in that one and the head; of either, in gathers."""

    ids: list[int]
    digest: str
    layers_ns: float
    last_ns: float
    layers_gathers_ns: float
    last_gathers_ns: float


class Part:
    """A stage of a member, which gathers over the links."""

    def __init__(self, stage: CpuStage, links: Links, gathers: list[Sequence[int]], speed: float) -> None:
        """Each gather by the borders of members' rows."""
        self.stage = stage
        self.gathers_ns = 0
        self._links, self._gathers, self._speed = links, gathers, speed
        self._rows: list[ctypes.c_int] = []
        self._began_ns = 0
        stage.gather_by(PythonGatherer(self._gather))

    def run(self, batch: Batch, hidden: Float32 | None) -> tuple[Float32, int]:
        """The result, and nanoseconds."""
        self.gathers_ns, self._began_ns = 0, perf_counter_ns()
        began_ns = self._began_ns
        result = self.stage.run(batch, hidden)
        return result, perf_counter_ns() - began_ns

    def _gather(self, number: int, own: Float32, whole: Float32) -> None:
        if number == len(self._rows):
            self._rows.append(self._links.add(own, whole, self._gathers[number]))
        ends_ns = self._began_ns + (perf_counter_ns() - self._began_ns) / self._speed
        while self._speed < 1 and perf_counter_ns() < ends_ns:
            pass
        self.gathers_ns += self._links.gather(self._rows[number])
        self._began_ns = perf_counter_ns()


class Member:
    def __init__(self, setting: Setting) -> None:
        os.sched_setaffinity(0, {setting.core})
        self.links = Links(Path(setting.folder), setting.member, spins=setting.spins)
        backend, self.parts = CpuBackend(1, yields=False), list[Part]()
        with Model.open(Path(setting.model)) as model:
            for program in setting.programs(model):
                stage = backend.load(program, model.tensors_for(program), _LIMITS, lambda done_bytes: None)
                self.parts.append(Part(stage, self.links, [*borders_of(model, program)], setting.speed))
        self.weight_bytes = sum(part.stage.weight_bytes for part in self.parts)

    def run(self, run: Run) -> Outcome:
        self.links.set_link(run.round_trip_ms, run.gbit_s)
        token, seen = FIRST_TOKEN, hashlib.sha256()
        ids: list[int] = []
        times: list[list[int]] = []
        for position in range(run.tokens + WARM):
            logits, nanoseconds = self._step(token, position)
            times.append(nanoseconds)
            token = int(logits.argmax())
            ids.append(token)
            if run.digest:
                seen.update(logits.tobytes())
        return Outcome(ids, seen.hexdigest(), *np.mean(times[WARM:], axis=0).tolist())

    def _step(self, token: int, position: int) -> tuple[Float32, list[int]]:
        one, starts = np.zeros(1, np.int32), np.array([0, 1], np.int32)
        tables = np.array([0, _BLOCKS], np.int32), np.arange(_BLOCKS, dtype=np.int32)
        batch, hidden, times = Batch(one + token, one + position, starts, *tables, one), None, list[int]()
        for part in self.parts:
            hidden, took_ns = part.run(batch, hidden)
            times.append(took_ns)
        assert hidden is not None
        return hidden[0], times + [part.gathers_ns for part in self.parts]


def borders_of(model: Model, program: Program) -> Iterator[Sequence[int]]:
    """Bytes of the rows of each gather as they travel: some are int8 values and scales in the room of fewer floats."""
    types = {name: tensor.quant_type for name, tensor in model.tensors_for(program).items()}
    gathers = (step for step in program.steps if isinstance(step, Gather))
    for step, form in zip(gathers, gather_formats(program, types), strict=True):
        yield step.borders if form is None else [packed_width(border, form) for border in step.borders]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()

    def say(value: Any) -> None:
        print(json.dumps(value), flush=True)

    given = map(json.loads, sys.stdin)
    setting = Setting(**next(given))
    member = Member(setting)
    say(member.links.port)
    member.links.connect(next(given), setting.hosts)
    say(member.weight_bytes)
    for run in given:
        say(asdict(member.run(Run(**run))))


if __name__ == "__main__":
    with ends_in_one_line():
        main()
