"""A prompt's rows through some layers: two members of a group, in turns with one process that has all of each layer.

    python benchmarks/groups/prefill.py 7b IQ2_XXS [--rows 512] [--layers 2] [--pairs 5] [--bands 1,2,3,4]
    python benchmarks/groups/prefill.py 7b IQ2_XXS --gbit 1 --round-trip 0.2 [--realtime]

Each process has one thread and a core of its own; members have the links of the product, over TLS, with a round trip
and a rate that `emulated.cpp` adds. Prints medians in milliseconds a layer, the speedup of pairs, what a member waits
in gathers and what it sends, for each number of bands; bits must be those of one process. One row is a step of decode.
`--hosts` are the addresses of the two members, of which the second may be that of a slower link.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from emulation import Emulation, LinkSpeed
from measuring.options import chosen, listed, positive, zero_or_more
from shape import LAYOUTS, SHAPES, check, write_shape

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.membership.authority import Authority
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import Link, Links, TlsSettings
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage
from llamaclust.model.groups.division import divide
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.security.credentials import Identity, Principal

SEED = 1
_DEADLINE_S = 60.0
_ANSWER_S = 600.0
_GREETING = b"prefill"
_NAMES = ("first", "second")


@dataclass(frozen=True, slots=True)
class Setting:
    """A member's, or with `end` None that of the process that computes alone."""

    model: Path
    layers: int
    rows: int
    core: int
    member: int = 0
    end: socket.socket | None = None
    identities: tuple[Identity, Identity] | None = None
    is_realtime: bool = False

    def load(self, model: Model) -> CpuStage:
        program = model.program(0, self.layers, KvType.F16, self.rows, 1)
        if self.end is not None:
            program = divide(program, (1.0, 1.0), self.member)
        limits = StageLimits(self.rows, 1, 1, self.rows, -(-self.rows // KV_BLOCK_TOKENS))
        return CpuBackend(1, yields=False).load(program, model.tensors_for(program), limits, lambda done_bytes: None)

    def links(self) -> Links | None:
        if self.end is None or self.identities is None:
            return None
        ours, theirs = self.identities[self.member], self.identities[1 - self.member]
        pair, host = ours.pair, theirs.principal.host(theirs.cluster)
        tls = TlsSettings(ours.ca, pair.certificate, pair.private_key, host, self.member == 0)
        link = Link(self.end.detach(), _NAMES[1 - self.member], tls, _GREETING, _GREETING, _DEADLINE_S)
        return Links(self.member, [link if place != self.member else None for place in range(2)], _DEADLINE_S)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Milliseconds of a run, of which gathers waited; what its member sent; and the digest of the result."""

    run_ms: float
    waited_ms: float
    sent_bytes: int
    digest: str


def serve(setting: Setting, orders: Connection) -> None:
    """Runs the prompt each time it is told to."""
    os.sched_setaffinity(0, {setting.core})
    if setting.is_realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    rows, blocks = setting.rows, np.arange(-(-setting.rows // KV_BLOCK_TOKENS), dtype=np.int32)
    tokens = np.random.default_rng(SEED).integers(3, 300, rows, np.int32)
    starts, tables = np.array([0, rows], np.int32), (np.array([0, len(blocks)], np.int32), blocks)
    batch = Batch(tokens, np.arange(rows, dtype=np.int32), starts, *tables, np.zeros(0, np.int32))
    with Model.open(setting.model) as model:
        stage = setting.load(model)
    links = setting.links()
    if links is not None:
        stage.gather_by(links)
    orders.send(None)
    step = 0
    while bands := orders.recv():
        step += 1
        if links is not None:
            links.begin(1, step)
            links.bands = bands
        before = None if links is None else links.counters()
        began_ns = perf_counter_ns()
        result = stage.run(batch, None)
        run_ms = (perf_counter_ns() - began_ns) / 1e6
        waited_ms, sent_bytes = 0.0, 0
        if links is not None and before is not None:
            after = links.counters()
            waited_ms, sent_bytes = 1e3 * (after.waited_s - before.waited_s), after.sent_bytes - before.sent_bytes
        orders.send((run_ms, waited_ms, sent_bytes, hashlib.sha256(result.tobytes()).hexdigest()))


@contextmanager
def served(settings: Sequence[Setting]) -> Iterator[list[Connection]]:
    context, found, processes = get_context("spawn"), list[Connection](), []
    try:
        for setting in settings:
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(setting, theirs), daemon=True))
            processes[-1].start()
            found.append(ours)
        for each in found:
            _answer(each)
        yield found
    finally:
        for process in processes:
            process.kill()


def _answer(orders: Connection) -> Any:
    if not orders.poll(_ANSWER_S):
        raise LlamaclustError(f"a process has not answered in {_ANSWER_S:g} s; measure less")
    return orders.recv()


def run(orders: Sequence[Connection], bands: int) -> list[Outcome]:
    for each in orders:
        each.send(bands)
    return [Outcome(*_answer(each)) for each in orders]


def connected(hosts: Sequence[str]) -> tuple[socket.socket, socket.socket]:
    with socket.create_server((hosts[0], 0)) as listener:
        second = socket.create_connection(listener.getsockname(), source_address=(hosts[1], 0))
        return listener.accept()[0], second


def measure(given: argparse.Namespace, folder: Path) -> None:
    model, shape = folder / "shape.gguf", replace(SHAPES[given.shape], layers=given.layers + 1)
    if given.hidden:
        shape = replace(shape, hidden=given.hidden, ffn=2 * given.hidden, vocabulary=512)
    check(shape, given.type)
    write_shape(model, given.shape, shape, given.type, SEED, alike=True)
    authority = Authority.open(folder / "authority")
    first, second = (authority.identity(Principal(name)) for name in _NAMES)
    if given.gbit or given.round_trip:
        emulation = Emulation.build(folder)
        emulation.set(LinkSpeed(given.round_trip, given.gbit))
        os.environ.update(emulation.variables())
    cores = sorted(os.sched_getaffinity(0))
    alone = Setting(model, given.layers, given.rows, cores[0], is_realtime=given.realtime)
    members = [
        replace(alone, core=cores[member % len(cores)], member=member, end=end, identities=(first, second))
        for member, end in enumerate(connected(given.hosts))
    ]
    with served([alone]) as one, served(members) as group:
        run(one, 1), run(group, given.bands[0])  # the first runs take memory from the system
        pairs = [(run(one, 1)[0], [run(group, bands) for bands in given.bands]) for _ in range(given.pairs)]
    if (
        len({each.digest for alone, turns in pairs for each in (alone, *(each for turn in turns for each in turn))})
        != 1
    ):
        raise LlamaclustError("a group has other bits than one process")
    for place, bands in enumerate(given.bands):
        show(given, bands, [(alone, turns[place]) for alone, turns in pairs])


def show(given: argparse.Namespace, bands: int, pairs: Sequence[tuple[Outcome, list[Outcome]]]) -> None:
    one_ms, group_ms = median(a.run_ms for a, _ in pairs), median(m[0].run_ms for _, m in pairs)
    speedup = median(a.run_ms / m[0].run_ms for a, m in pairs)
    waited_ms, sent = median(m[0].waited_ms for _, m in pairs), pairs[0][1][0].sent_bytes
    print(
        f"{given.shape} {given.type.name}, {given.rows} rows, bands: {bands}, a layer: "
        f"one process {one_ms / given.layers:.1f} ms, group {group_ms / given.layers:.1f} ms, "
        f"of which {waited_ms / given.layers:.1f} ms waiting; "
        f"speedup {speedup:.2f}; {sent / given.layers / 1e6:.2f} MB sent; same bits"
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    types = {kind.name: kind for kind in LAYOUTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shape", choices=SHAPES)
    add("type", type=chosen("type", types), metavar="TYPE")
    add("--rows", type=positive, default=512, help="of the prompt; %(default)s by default")
    add("--layers", type=positive, default=2, help="that are computed; %(default)s by default")
    add("--hidden", type=positive, help="another width, for tests")
    add("--pairs", type=positive, default=5, help="%(default)s by default")
    add("--hosts", type=listed(str), default="127.0.0.1,127.0.0.1", help="of the members; loopback by default")
    add("--bands", type=listed(positive), default="2", help="of the prompt, in turns; %(default)s by default")
    add("--round-trip", type=zero_or_more, default=0.0, metavar="MS", help="that is added to links; none by default")
    add("--gbit", type=zero_or_more, default=0.0, help="that a member receives, 0 (default): no limit")
    add("--realtime", action="store_true", help="other programs wait for the measured ones; for root")
    given = parser.parse_args(arguments)
    if len(given.hosts) != 2:
        parser.error("--hosts: one address for each of two members")
    return given


if __name__ == "__main__":
    with ends_in_one_line(), tempfile.TemporaryDirectory(prefix="llamaclust-") as place:
        measure(parse(sys.argv[1:]), Path(place))
