"""Sums over k in blocks that a tree joins: what they would cost products, and gain groups, relative to one chain.

    python benchmarks/groups/numerics.py                       # costs of products, then tokens of groups; 15 minutes
    python benchmarks/groups/numerics.py --parts tokens --gb-s 25,50        # products as fast as these read weights

Blocks of k (8 or 16, whole 256s, a function of k alone) would allow columns to be divided, with two exchanges a layer
in place of four, and a product to begin with the inputs that are there, whichever they are. Products are measured here
on one thread, and a gather's cost on loopback; latency and rate of links are given, tokens follow by arithmetic.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import links
import sums
from measuring.options import chosen, listed, positive
from sums import Products, Way
from token_model import MODELS, Estimate, Link, Model, Setting, Times, estimate, products

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.model.quant_types import QuantType
from llamaclust.worker.devices.system_info import processor_name

PARTS = ("costs", "tokens", "prompts")
COST_COLUMNS = (4096, 8192, 14336, 28672)
COST_ROWS = {1: 4096, 8: 1024, 512: 64}
"""Rows of the matrices for so many tokens."""
MEMORY_BYTES = 512 << 20
"""Weights that one token reads; eight read an eighth of them."""
GATHER_BYTES, GATHERS = (1024, 4096, 16384, 65536), 2000
PROMPT = 512
LIMIT_GAIN, LIMIT_COST = 1.08, 1.01
_REFERENCE = 4096, 4096
_ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Times of sums in 8 and 16 blocks, and of one chain in two passes, relative to one chain."""

    quant_type: QuantType
    columns: int
    tokens: int
    near: bool
    gb_s: float
    gmac_s: float
    blocks_8: float
    blocks_16: float
    two_passes: float

    def __str__(self) -> str:
        speed = (
            f"{self.columns:7} {self.tokens:6} {'near' if self.near else 'far':>8} {self.gb_s:6.1f} {self.gmac_s:7.1f}"
        )
        return f"{self.quant_type.name:5} {speed} {self.blocks_8:9.3f} {self.blocks_16:9.3f} {self.two_passes:10.3f}"


COST_HEADER = "type  columns tokens prefetch   GB/s  GMAC/s  8 blocks 16 blocks two passes"


def costs(library: Path, types: Sequence[QuantType], turns: int) -> Iterator[Cost]:
    for quant_type in types:
        for columns in COST_COLUMNS:
            for tokens, rows in COST_ROWS.items():
                size = rows * quant_type.info.row_bytes(columns)
                task = Products(library, quant_type, rows, columns, max(1, MEMORY_BYTES // size // tokens))
                near = tokens == 1 and task.prefers_near()
                ways = (Way.BLOCKS, 8), (Way.BLOCKS, 16), (Way.TWO_PASSES, 8)
                seconds, *ratios = task.ratios(tokens, ways, turns, near=near)
                task.close()
                speeds = task.bytes / seconds / 1e9, rows * columns * tokens / seconds / 1e9
                yield Cost(quant_type, columns, tokens, near, *speeds, *ratios)


class Rates:
    """Speeds of a member's products of one row, on one thread."""

    def __init__(self, library: Path, quant_type: QuantType, turns: int) -> None:
        self._library, self._type, self._turns = library, quant_type, turns
        self._reference = self._open(*_REFERENCE)
        self._near = self._reference.prefers_near()
        self._relative: dict[tuple[int, int], float] = {}
        self._seconds: list[float] = []

    def _open(self, rows: int, columns: int) -> Products:
        size = rows * self._type.info.row_bytes(columns)
        return Products(self._library, self._type, rows, columns, max(1, MEMORY_BYTES // size))

    def relative(self, rows: int, columns: int) -> float:
        """Bytes a second, relative to those of the reference; measured in turns with it."""
        if (rows, columns) not in self._relative:
            task, ratios = self._open(rows, columns), []
            for _ in range(self._turns):
                mine, its = (x.seconds(Way.CHAIN, 1, 1, near=self._near) / x.bytes for x in (task, self._reference))
                self._seconds.append(its * self._reference.bytes)
                ratios.append(its / mine)
            task.close()
            self._relative[rows, columns] = median(ratios)
        return self._relative[rows, columns]

    @property
    def gb_s(self) -> float:
        return self._reference.bytes / median(self._seconds) / 1e9

    def times(self, model: Model, members: int, gb_s: float) -> Times:
        """Microseconds of a member's products where the reference reads so fast."""
        found = {}
        for name, (rows, columns) in products(model, members).items():
            size = rows * self._type.info.row_bytes(columns)
            found[name] = size / (gb_s * 1e3) / self.relative(rows, columns)
        return found


def _gathers(folder: Path, member: int, hosts: list[str], core: int, answers: Connection) -> None:
    os.sched_setaffinity(0, {core})
    link = links.Links(folder, member, spins=True)
    answers.send(link.port)
    link.connect(answers.recv(), hosts)
    rows = []
    for size in GATHER_BYTES:
        own, whole = np.zeros(size // 4, np.float32), np.zeros(size // 2, np.float32)
        rows.append(link.add(own, whole, (0, size // 4, size // 2)))
    answers.send([median(link.gather(row) / 1e3 for _ in range(GATHERS)) for row in rows])


def gather_us(folder: Path) -> list[float]:
    """Medians of gathers between two processes on loopback, of messages of `GATHER_BYTES`."""
    links.build(folder)
    hosts, cores = links.write_keys(folder, 2), sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in hosts]
    members = [
        context.Process(target=_gathers, args=(folder, i, hosts, cores[i % len(cores)], pipes[i][1]), daemon=True)
        for i in range(2)
    ]
    for member in members:
        member.start()
    ports = [_answer(pipe) for pipe, _ in pipes]
    for pipe, _ in pipes:
        pipe.send(ports)
    found: list[float] = _answer(pipes[0][0])
    for member in members:
        member.join(_ANSWER_S)
    return found


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(_ANSWER_S):
        raise TimeoutError(f"a member has not answered in {_ANSWER_S:g} s")
    return pipe.recv()


def message_cost(times_us: Sequence[float]) -> tuple[float, float]:
    """Microseconds of a message and of each of its bytes, on either side: halves of a gather's."""
    slope, first = np.polyfit(GATHER_BYTES, times_us, 1)
    return max(0.0, float(first)) / 2, max(0.0, float(slope)) / 2


TOKEN_HEADER = (
    "                                                      in turn         |    overlapped        | norms\n"
    "model GB/s members one way, ms Gbit/s  one, ms    rows columns   gain |  rows  blocks   gain | behind"
)


def line(name: str, gb_s: float, setting: Setting, found: Estimate) -> str:
    """Speeds relative to one member."""
    link, one = setting.link, found.one_us
    head = f"{name:4} {gb_s:5.1f} {setting.members:7} {link.latency_us / 1e3:11g} {link.gbit_s:6g} {one / 1e3:8.1f}"
    plain = f"{one / found.plain_rows_us:7.2f} {one / found.plain_columns_us:7.2f} {found.plain_gain:6.3f}"
    overlapped = f"{one / found.rows_us:5.2f} {one / found.blocks_us:7.2f} {found.gain:6.3f}"
    return f"{head} {plain} | {overlapped} | {one / found.throughout_us:6.2f}"


def tokens(given: argparse.Namespace, rates: Rates, cost: tuple[float, float]) -> None:
    print(TOKEN_HEADER)
    for speed in given.gb_s:
        gains = []
        for name in given.models:
            for members in given.members:
                model = MODELS[name]
                rates.times(model, members, 1.0)  # measured
                gb_s = speed or rates.gb_s
                times, one = rates.times(model, members, gb_s), rates.times(model, 1, gb_s)
                for latency in given.latency_ms:
                    for gbit in given.gbit:
                        setting = Setting(model, members, Link(latency * 1e3, gbit, *cost), given.layer_us)
                        gains.append(estimate(setting, times, one))
                        print(line(name, gb_s, setting, gains[-1]), flush=True)
        plain, gain = median(x.plain_gain for x in gains), median(x.gain for x in gains)
        norms = median(x.rows_us / x.throughout_us for x in gains)
        print(
            f"median gains: {plain:.3f} in turn, {gain:.3f} overlapped (limit {LIMIT_GAIN}), norms behind {norms:.3f}"
        )


def prompt_ms(model: Model, members: int, gbit: float, gmac_s: float, *, by_columns: bool) -> tuple[float, float]:
    """A member's times in ms for a layer with `PROMPT` rows: computing, and sending its results."""
    hidden, others = model.hidden, members - 1
    macs = PROMPT * (hidden * (2 * hidden + model.kv_width) + 3 * hidden * model.ffn) / members
    row_bytes = others / members * ((hidden + model.ffn) * (1 + 4 / 256) + 2 * 4 * hidden)
    if by_columns:  # sums of some rows to each member, then whole sums to all
        row_bytes = 2 * 2 * 4 * hidden * others / members
    return macs / gmac_s / 1e6, PROMPT * row_bytes * 8 / gbit / 1e6


def prompts(given: argparse.Namespace, library: Path) -> None:
    task = Products(library, given.type, 64, 4096)
    gmac_s = 64 * 4096 * PROMPT / median(task.seconds(Way.CHAIN, 1, PROMPT) for _ in range(given.turns)) / 1e9
    task.close()
    print(
        f"prompts of {PROMPT} rows, {gmac_s:.0f} GMAC/s: ms a layer\nmodel members Gbit/s computing  rows sent  columns"
    )
    for name in given.models:
        for members in given.members:
            for gbit in given.gbit:
                each = [prompt_ms(MODELS[name], members, gbit, gmac_s, by_columns=way) for way in (False, True)]
                print(f"{name:5} {members:7} {gbit:6g} {each[0][0]:9.1f} {each[0][1]:10.1f} {each[1][1]:8.1f}")


def cost_summary(found: Sequence[Cost]) -> Iterator[str]:
    for count in COST_ROWS:
        rows = [cost for cost in found if cost.tokens == count]
        eight, sixteen = median(cost.blocks_8 for cost in rows), median(cost.blocks_16 for cost in rows)
        yield f"{count} tokens: medians {eight:.3f} (8 blocks), {sixteen:.3f} (16); the limit is {LIMIT_COST}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, types = parser.add_argument, {kind.name: kind for kind in sums.TYPES}
    add("--parts", type=listed(chosen("part", {part: part for part in PARTS})), default=",".join(PARTS))
    add("--types", type=listed(chosen("type", types)), default=",".join(types), help="of costs; %(default)s by default")
    add("--type", type=chosen("type", types), default="Q4_K", help="of tokens and prompts; %(default)s by default")
    add("--models", type=listed(chosen("model", {name: name for name in MODELS})), default=",".join(MODELS))
    add("--members", type=listed(positive), default="2,4", help="%(default)s by default")
    add("--latency-ms", type=listed(float), default="0.1,0.3", help="one way; %(default)s by default")
    add("--gbit", type=listed(float), default="1,2.5", help="of each member's link; %(default)s by default")
    add(
        "--gb-s",
        type=listed(float),
        default="0",
        help="at which a member's products read; 0: as measured on one thread",
    )
    add(
        "--message-us",
        type=float,
        help="processor time of a message on either side; as measured on loopback by default",
    )
    add("--layer-us", type=float, default=50.0, help="norms, sums and attention of a layer; %(default)s by default")
    add("--turns", type=positive, default=21, help="of each measurement; %(default)s by default")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    given = parse(arguments)
    print(processor_name())
    with tempfile.TemporaryDirectory(prefix="llamaclust-") as folder:
        library = sums.build(Path(folder))
        if "costs" in given.parts:
            print(COST_HEADER)
            found = []
            for cost in costs(library, given.types, given.turns):
                found.append(cost)
                print(cost, flush=True)
            print(*cost_summary(found), sep="\n", flush=True)
        if "tokens" in given.parts:
            times_us = gather_us(Path(folder))
            cost_us = message_cost(times_us)
            if given.message_us is not None:
                cost_us = given.message_us, cost_us[1]
            sizes = ", ".join(f"{us:.0f} us ({size})" for us, size in zip(times_us, GATHER_BYTES, strict=True))
            print(f"gathers on loopback, bytes: {sizes}")
            print(f"a message costs {cost_us[0]:.1f} us and {1e3 * cost_us[1]:.2f} ns a byte", flush=True)
            tokens(given, Rates(library, given.type, given.turns), cost_us)
        if "prompts" in given.parts:
            prompts(given, library)


if __name__ == "__main__":
    with ends_in_one_line():
        main(sys.argv[1:])
