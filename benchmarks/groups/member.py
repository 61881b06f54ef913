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
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from divided import CONTEXT, Cut, DividedPlan, Weights
from links import Links
from shape import Shape

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.kernels import _native
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.model.quant_types import QuantType

FIRST_TOKEN = 1
WARM = 2
"""Tokens before those that are measured."""


@dataclass(frozen=True, slots=True)
class Setting:
    """`spins`: it has its core for itself; `speed`: below 1, it waits behind each part, as a slower machine would."""

    folder: str
    hosts: list[str]
    member: int
    shape: dict[str, int]
    quant_type: str
    shares: tuple[float, ...]
    gathers: int
    int8: bool
    core: int
    spins: bool
    speed: float

    @property
    def cut(self) -> Cut:
        return Cut(Shape(**self.shape), QuantType[self.quant_type], tuple(self.shares), self.gathers)


@dataclass(frozen=True, slots=True)
class Run:
    """So many tokens, from an empty context; `digest`: of all logits."""

    tokens: int
    round_trip_ms: float = 0
    gbit_s: float = 0
    digest: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """Mean nanoseconds of a token: in all layers, behind them, and of the layers in gathers."""

    ids: list[int]
    digest: str
    layers_ns: float
    head_ns: float
    gathers_ns: float


class Member:
    def __init__(self, setting: Setting) -> None:
        os.sched_setaffinity(0, {setting.core})
        self.links = Links(Path(setting.folder), setting.member, spins=setting.spins)
        weights = Weights(setting.cut, setting.member)
        divided = DividedPlan(setting.cut, weights)
        self.weight_bytes, self._speed = weights.n_bytes, setting.speed
        self._stage = _native.Stage(divided.plan, _native.available_levels()[-1], _native.ThreadPool(1, False))
        self._stage.prepare()
        self._rows: list[ctypes.c_int | None] = []
        for gather in divided.gathers:
            if gather is None:
                self._rows.append(None)
                continue
            own, whole = self._stage.contents(gather.own), self._stage.contents(gather.whole)
            segment = gather.segment if setting.int8 else 0
            self._rows.append(self.links.add(own, whole, gather.columns, segment))
        self._logits = self._stage.contents(divided.logits)[0]
        self._token, self._position = np.zeros(1, np.int32), np.zeros(1, np.int32)
        starts, blocks, none = np.array([0, 1], np.int32), CONTEXT // KV_BLOCK_TOKENS, np.empty(0, np.int32)
        tables = np.array([0, blocks], np.int32), np.arange(blocks, dtype=np.int32)
        self._batch = self._token, self._position, starts, *tables, none, None

    def run(self, run: Run) -> Outcome:
        self.links.set_link(run.round_trip_ms, run.gbit_s)
        token, seen = FIRST_TOKEN, hashlib.sha256()
        ids: list[int] = []
        times: list[tuple[int, int, int]] = []
        for position in range(run.tokens + WARM):
            self._token[0], self._position[0] = token, position
            times.append(self._step())
            token = int(self._logits.argmax())
            ids.append(token)
            if run.digest:
                seen.update(self._logits.tobytes())
        layers, head, gathers = np.mean(times[WARM:], axis=0).tolist()
        return Outcome(ids, seen.hexdigest(), layers, head, gathers)

    def _step(self) -> tuple[int, int, int]:
        stage, batch, links, gathers_ns = self._stage, self._batch, self.links, 0
        began = at = perf_counter_ns()
        for part, row in enumerate(self._rows):
            at = perf_counter_ns()
            stage.set_part(part)
            stage.run(*batch)
            if self._speed < 1:
                ends = at + (perf_counter_ns() - at) / self._speed
                while perf_counter_ns() < ends:
                    pass
            gather_ns = links.gather(row) if row is not None else 0
            gathers_ns += gather_ns if part < len(self._rows) - 1 else 0
        return at - began, perf_counter_ns() - at, gathers_ns


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
