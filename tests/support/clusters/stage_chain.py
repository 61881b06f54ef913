"""Stages in one process, each with its own server, over real streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from llamaclust.cluster.membership.authority import Authority
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.loader import Model
from llamaclust.wire.control.messages import Deadlines
from llamaclust.wire.microbatch.codec import encode_microbatch
from llamaclust.wire.microbatch.frames import encode_hidden
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import Microbatch, Result, SamplingInputs
from llamaclust.wire.microbatch.results import decode_result
from llamaclust.wire.rpc.client import ClientStream, Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import FORWARD, SAMPLE
from llamaclust.wire.rpc.server import Server
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Credentials
from llamaclust.wire.security.token import ClusterToken
from llamaclust.worker.service import StageService
from llamaclust.worker.stage.compute import Compute
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.stage.loop import StageContext
from llamaclust.worker.stage.stage_runner import StageRunner
from llamaclust.worker.stage.streams import Neighbours, StageStreams
from support.clusters.real_cluster import LIMITS

TOKEN = ClusterToken("t" * 40)
DEADLINES = Deadlines(sampling_inputs_s=30.0, forward_s=30.0)  # Longer than a stall of a busy machine.


def runner_of(model: Model, start: int, end: int) -> StageRunner:
    return StageRunner(ReferenceBackend(), model, start, end, LIMITS)


@dataclass(slots=True)
class Chain:
    """Stages of epoch 1, each with its own server, and streams to the first and the last stage."""

    model_id: str
    runners: list[StageRunner]
    peers: list[Peer]
    forward: ClientStream
    sample: ClientStream

    @property
    def first(self) -> Peer:
        return self.peers[0]

    @property
    def last(self) -> Peer:
        return self.peers[-1]

    async def submit(self, microbatch: Microbatch, inputs: SamplingInputs | None) -> None:
        await self.forward.write(encode_hidden(encode_microbatch(microbatch)))
        if inputs is not None:
            await self.sample.write(encode_inputs(inputs))

    async def result(self) -> Result:
        async with deadline("a result", 20.0):
            data = await self.sample.read()
        assert data is not None
        return decode_result(data)


async def not_reported(peer: Peer, reason: str) -> None:
    """Does nothing, for tests in which all stages are reachable."""


def neighbours(addresses: Sequence[str], index: int, trust: Authority | None) -> Neighbours:
    """Returns the neighbours of the stage at `index`."""
    first, last = index == 0, index + 1 == len(addresses)

    def way_to(there: int) -> Peer:
        return Peer(addresses[there], credentials(trust, f"w{index}"), Principal(f"w{there}"))

    return Neighbours(
        not_reported,
        next=None if last else way_to(index + 1),
        first=way_to(0) if last and not first else None,
        previous_worker=None if first else f"w{index - 1}",
        last_worker=f"w{len(addresses) - 1}" if first and not last else None,
    )


def credentials(trust: Authority | None, worker: str | None = None) -> Credentials:
    """Returns the credentials of a worker, or of the coordinator."""
    return TOKEN if trust is None else trust.identity(Principal(worker))


@asynccontextmanager
async def chain(
    model: Model,
    folder: Path,
    cuts: Sequence[int] = (0, 1, 3),
    deadlines: Deadlines = DEADLINES,
    trust: Authority | None = None,
) -> AsyncIterator[Chain]:
    """Runs stages on workers w0, w1, ...: over mutual TLS if `trust` is given, else on unix sockets."""
    compute, names = Compute(), [f"w{index}" for index in range(len(cuts) - 1)]
    runners = [runner_of(model, start, end) for start, end in pairwise(cuts)]
    services = [StageService(name) for name in names]
    servers = [
        await Server.start(
            f"unix:{folder}/{name}.sock" if trust is None else "127.0.0.1:0", credentials(trust, name), service.handlers
        )
        for name, service in zip(names, services, strict=True)
    ]
    addresses = [server.address for server in servers]
    peers = [Peer(address, credentials(trust), Principal(name)) for address, name in zip(addresses, names, strict=True)]
    for index, (service, runner) in enumerate(zip(services, runners, strict=True)):
        around = neighbours(addresses, index, trust)
        service.add(StageStreams(1, runner, StageContext(names[index], compute, Counters()), deadlines, around))
    sample = peers[-1].open(SAMPLE, epoch=1)
    await sample.opened()
    forward = peers[0].open(FORWARD, epoch=1)
    await forward.opened()
    try:
        yield Chain(model.model_id, runners, peers, forward, sample)
    finally:
        await asyncio.gather(*(peer.close() for peer in peers))
        await asyncio.gather(*(server.stop(0.0) for server in servers))
        await asyncio.gather(*(service.remove(1) for service in services))
        compute.close()
