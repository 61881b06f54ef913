from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from emulated.emulation import Emulation, LinkSpeed
from runner.case import Case, Group, Measures, argument, option
from runner.models import TYPES
from runner.options import chosen, listed, positive, zero_or_more
from shape import SHAPES, write_shape

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
from llamaclust.model.quant_types import QuantType
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Identity

SEED = 1
_DEADLINE_S = 60.0
_ANSWER_S = 600.0
_GREETING = b"prefill"
_NAMES = ("first", "second")


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of a process. `end` is the socket to the other member of the group, or None without a group."""

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


def serve(setting: Setting, orders: Connection) -> None:
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
        orders.send((run_ms, waited_ms, sent_bytes, result.tobytes()))


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
        raise LlamaclustError(
            f"a measured process has not answered in {_ANSWER_S:g} s; choose fewer --rows or --layers"
        )
    return orders.recv()


def connected(hosts: Sequence[str]) -> tuple[socket.socket, socket.socket]:
    with socket.create_server((hosts[0], 0)) as listener:
        second = socket.create_connection(listener.getsockname(), source_address=(hosts[1], 0))
        return listener.accept()[0], second


@dataclass(frozen=True)
class Prefill(Case):
    """Compares the prefill time of a layer on two members of a group with one process that computes alone.
    The members are on --hosts and use links with TLS. All results must have the same bits."""

    warm = 1
    shape: str = argument("shape of the model", chosen("shape", {name: name for name in SHAPES}))
    type: QuantType = argument("type of the weights", chosen("type", TYPES))
    rows: int = option(512, "number of tokens in the prompt", positive)
    layers: int = option(2, "number of layers to compute", positive)
    hidden: int | None = option(None, "width in channels, for tests (default: the shape's width)", positive)
    hosts: tuple[str, ...] = option(("127.0.0.1", "127.0.0.1"), "addresses of the two members", listed(str))
    bands: tuple[int, ...] = option(
        (2,), "numbers of bands to try; members exchange a prompt in this many parts", listed(positive)
    )
    round_trip: float = option(0.0, "milliseconds to add to the round trips of links", zero_or_more)
    gbit: float = option(0.0, "rate in Gbit/s at which a member receives (0: no limit)", zero_or_more)
    realtime: bool = option(False, "give measured processes real-time priority; needs root")

    async def groups(self) -> AsyncIterator[Group]:
        with tempfile.TemporaryDirectory(prefix="llamaclust-") as name:
            folder, shape = Path(name), replace(SHAPES[self.shape], layers=self.layers + 1)
            if self.hidden:
                shape = replace(shape, hidden=self.hidden, ffn=2 * self.hidden, vocabulary=512)
            write_shape(folder / "shape.gguf", self.shape, shape, self.type, SEED, alike=True)
            authority = Authority.open(folder / "authority")
            first, second = (authority.identity(Principal(name)) for name in _NAMES)
            if self.gbit or self.round_trip:
                emulation = Emulation.build(folder)
                emulation.set(LinkSpeed(self.round_trip, self.gbit))
                os.environ.update(emulation.variables())
            cores = sorted(os.sched_getaffinity(0))
            alone = Setting(folder / "shape.gguf", self.layers, self.rows, cores[0], is_realtime=self.realtime)
            members = [
                replace(alone, core=cores[member % len(cores)], member=member, end=end, identities=(first, second))
                for member, end in enumerate(connected(self.hosts))
            ]
            with served([alone]) as one, served(members) as group:
                variants = {f"bands: {bands}": partial(self._measure, group, bands) for bands in self.bands}
                name = f"{self.shape} {self.type.name}, {self.rows} rows, a layer"
                yield Group(name, {"one process": partial(self._measure, one, 1), **variants}, {"ms": ""})

    async def _measure(self, orders: Sequence[Connection], bands: int, turn: int) -> Measures:
        for each in orders:
            each.send(bands)
        found = [await asyncio.to_thread(_answer, each) for each in orders]
        if len({result for *_, result in found}) != 1:
            raise LlamaclustError("the members' results have different bits")
        run_ms, waited_ms, sent_bytes, result = found[0]
        layer = {"ms": run_ms / self.layers, "waiting": waited_ms / self.layers}
        return {**layer, "MB sent": sent_bytes / self.layers / 1e6, "bits": result}
