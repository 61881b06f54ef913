"""Groups: members that share every product's output rows, in turns with one process that has them all.

    python benchmarks/groups/group.py 1.1b IQ2_XXS [--round-trips 0,0.1,0.5,2]
    python benchmarks/groups/group.py 70b IQ1_S --layers 2                           # each layer counts 40 times
    python benchmarks/groups/group.py 70b IQ1_S --layers 2 --shares 2,1 --speeds 1,0.5         # unequal machines
    python benchmarks/groups/group.py 1.1b IQ2_XXS --shares 2,1,1 --cores 0,1,1      # three processes on two cores

Members decode one sequence of a model with random weights, the shape of `shape.py`, each on one thread, with the
programs of `divide`, and exchange activations over mutual TLS on loopback. A gather is complete half a round trip after
the last member has sent, and later by what its messages take at --gbit. Tokens and bits of logits must be those of the
one process. Medians of pairs; the round trip at which both are as fast is that of the line through all. The model is
written to a temporary folder. Links are C++, built at the start: a compiler and OpenSSL's headers are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Self, TextIO

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from links import build, write_keys
from measuring.options import chosen, listed, positive
from member import CONTEXT, Outcome, Run, Setting
from shape import LAYOUTS, SHAPES, Shape, check, write_shape

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.errors import LlamaclustError
from llamaclust.kernels import probes
from llamaclust.worker.devices.system_info import processor_name

CHECKED_TOKENS = 16
SEED = 1
_ANSWER_S, _END_S = 1800.0, 10.0
_HEADER = "  trip, ms   one, ms group, ms  gathered     tok/s  speedup"


class Group:
    """Processes that run until the context ends."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        command = [sys.executable, str(Path(__file__).parent / "member.py")]
        self._settings = settings
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in settings
        ]
        self.weight_bytes: list[int] = []

    def __enter__(self) -> Self:
        try:
            ports = self._request([asdict(setting) for setting in self._settings])
            self.weight_bytes = self._request([ports] * len(ports))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, run: Run) -> list[Outcome]:
        return [Outcome(**answer) for answer in self._request([asdict(run)] * len(self._processes))]

    def _request(self, values: Sequence[Any]) -> list[Any]:
        for process, value in zip(self._processes, values, strict=True):
            print(json.dumps(value), file=process.stdin, flush=True)
        until_s = time.monotonic() + _ANSWER_S
        return [json.loads(self._line(member, until_s)) for member in range(len(self._processes))]

    def _line(self, member: int, until_s: float) -> str:
        """A member's answer. LlamaclustError where it has none by then."""
        answers = self._processes[member].stdout
        assert answers is not None
        if not select.select([answers], [], [], max(0.0, until_s - time.monotonic()))[0]:
            raise LlamaclustError(f"member {member} has not answered in {_ANSWER_S:g} s; measure less")
        if not (line := answers.readline()):
            raise LlamaclustError(f"member {member} has ended; see above")
        return line


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds of a token of the whole model, and in its layers' gathers: medians, as the speedup of pairs."""

    round_trip_ms: float
    one_ms: float
    group_ms: float
    gathers_ms: float
    speedup: float

    def __str__(self) -> str:
        values = f"{self.round_trip_ms:10g} {self.one_ms:9.2f} {self.group_ms:9.2f} {self.gathers_ms:9.2f}"
        return f"{values} {1e3 / self.group_ms:9.2f} {self.speedup:8.2f}"


def break_even_ms(rows: Sequence[Row]) -> float:
    """The round trip at which a group is as fast as one process, on the line through all; 0: none is. What a group
    gains falls by half a round trip per gather."""
    if len({row.round_trip_ms for row in rows}) < 2:
        return 0.0
    slope, gain = np.polyfit([row.round_trip_ms for row in rows], [row.one_ms - row.group_ms for row in rows], 1)
    return float("inf") if slope >= 0 else max(0.0, float(-gain / slope))


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured: `shape` has some of the whole model's `layers`."""

    given: argparse.Namespace
    shape: Shape
    layers: int

    def settings(self, folder: str, hosts: list[str], model: Path, *, is_alone: bool) -> list[Setting]:
        """The settings of all members, or of one process that computes alone."""
        given = self.given
        return [
            Setting(
                folder=folder,
                hosts=hosts,
                member=member,
                model=str(model),
                shares=(1.0,) if is_alone else given.shares,
                core=given.cores[member],
                spins=len(set(given.cores)) == len(given.cores),
                speed=max(given.speeds) if is_alone else given.speeds[member],
            )
            for member in range(1 if is_alone else len(hosts))
        ]

    def pair(self, one: Group, group: Group, run: Run) -> tuple[Outcome, Outcome]:
        """One process, and a group's first member. LlamaclustError where tokens or bits differ."""
        (alone,), members = one.run(run), group.run(run)
        if any((outcome.ids, outcome.digest) != (alone.ids, alone.digest) for outcome in members):
            raise LlamaclustError("a group has other tokens or logits than one process")
        return alone, members[0]

    def whole_ms(self, outcome: Outcome) -> float:
        return self._all_ms(outcome.layers_ns, outcome.last_ns)

    def _all_ms(self, layers_ns: float, last_ns: float) -> float:
        return (layers_ns * (self.layers - 1) / (self.shape.layers - 1) + last_ns) / 1e6

    def row(self, one: Group, group: Group, run: Run) -> Row:
        pairs = [self.pair(one, group, run) for _ in range(self.given.pairs)]
        return Row(
            round_trip_ms=run.round_trip_ms,
            one_ms=median(self.whole_ms(alone) for alone, _ in pairs),
            group_ms=median(self.whole_ms(member) for _, member in pairs),
            gathers_ms=median(self._all_ms(each.layers_gathers_ns, each.last_gathers_ns) for _, each in pairs),
            speedup=median(self.whole_ms(alone) / self.whole_ms(member) for alone, member in pairs),
        )


def measure(task: Task, folder: str, file: TextIO | None) -> None:
    given, model = task.given, Path(folder) / "shape.gguf"
    build(Path(folder))
    write_shape(model, given.shape, task.shape, given.type, SEED, alike=True)
    hosts = write_keys(Path(folder), len(given.shares))
    one_setting, settings = (task.settings(folder, hosts, model, is_alone=alone) for alone in (True, False))
    with Group(one_setting) as one, Group(settings) as group:
        print(_HEADER, flush=True)
        alone, _ = task.pair(one, group, Run(CHECKED_TOKENS, digest=True))
        rows = []
        for trip in given.round_trips:
            rows.append(task.row(one, group, Run(given.tokens, trip, given.gbit)))
            print(rows[-1], flush=True)
        parts = ", ".join(f"{n_bytes / one.weight_bytes[0]:.2f}" for n_bytes in group.weight_bytes)
        pays = f"pays below a round trip of {break_even_ms(rows):.2f} ms"
        print(f"same bits ({alone.digest[:16]}); {pays}; members have {parts} of all", flush=True)
    for row in rows if file is not None else ():
        options = {name: getattr(given, name) for name in ("shape", "shares", "speeds", "gbit")}
        print(json.dumps({**options, "type": given.type.name, **asdict(row)}), file=file, flush=True)


def between(least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        if not least <= float(text) <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be {least:g} to {most:g}")
        return float(text)

    return read


def parse(arguments: list[str]) -> argparse.Namespace:
    types = {kind.name: kind for kind in LAYOUTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shape", choices=SHAPES)
    add("type", type=chosen("type", types), metavar="TYPE")
    add("--layers", type=positive, help="fewer than the shape has, 2 or more; times are of the whole model")
    add("--hidden", type=positive, help="another width, for tests")
    add("--shares", type=listed(between(0.01, 100)), default="1,1", help="of the members' work; %(default)s by default")
    add("--speeds", type=listed(between(0.01, 1)), help="of the members, relative to this machine; 1 by default")
    add("--cores", type=listed(int), help="of the members; in turn by default")
    add("--round-trips", type=listed(between(0, 1000)), default="0,0.1,0.5,2", help="ms; %(default)s by default")
    add("--gbit", type=between(0, 1000), default=0.0, help="of each member's link; 0: that of loopback")
    add("--tokens", type=positive, default=32, help="of a run; %(default)s by default")
    add("--pairs", type=positive, default=5, help="%(default)s by default")
    add("--json", type=Path, help="also write the rows there, a JSON object a line")
    given = parser.parse_args(arguments)
    members, cpus = len(given.shares), sorted(os.sched_getaffinity(0))
    given.speeds = given.speeds or [1.0] * members
    given.cores = given.cores or [cpus[member % len(cpus)] for member in range(members)]
    if members < 2 or {len(given.speeds), len(given.cores)} != {members}:
        parser.error("--shares, --speeds and --cores: two or more members, as many of each")
    if given.layers == 1:
        parser.error("--layers: 2 or more, of which the last is measured with the head")
    if given.tokens > CONTEXT // 2 or not {*given.cores} <= {*cpus}:
        parser.error(f"--tokens is at most {CONTEXT // 2}, cores are of {cpus}")
    return given


def main(arguments: list[str]) -> None:
    given = parse(arguments)
    whole = SHAPES[given.shape]
    if given.hidden:
        whole = replace(whole, hidden=given.hidden, ffn=2 * given.hidden, vocabulary=512)
    task = Task(given, replace(whole, layers=given.layers or whole.layers), whole.layers)
    check(task.shape, given.type)
    limits = f"reads {probes.ReadProbe(1).measure():.1f} GB/s, {probes.int8_peak(1):.0f} GMAC/s on one thread"
    print(
        f"{processor_name()}, {limits}; {given.shape} {given.type.name}, {task.shape.layers} of {whole.layers} layers"
    )
    output = given.json.open("w") if given.json is not None else nullcontext()
    with tempfile.TemporaryDirectory(prefix="llamaclust-") as folder, output as file:
        measure(task, folder, file)


if __name__ == "__main__":
    with ends_in_one_line():
        main(sys.argv[1:])
