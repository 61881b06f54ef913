"""Stages in one process, each behind a server of its own, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from real_cluster import LIMITS

from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.loader import Model
from llamaclust.wire.channels import FORWARD, SAMPLE, ClientStream, Peer
from llamaclust.wire.codec import decode_result, encode_inputs, encode_microbatch
from llamaclust.wire.control import Deadlines
from llamaclust.wire.deadlines import deadline
from llamaclust.wire.frames import encode_hidden
from llamaclust.wire.messages import Microbatch, Result, SamplingInputs
from llamaclust.wire.server import Server
from llamaclust.wire.token import ClusterToken
from llamaclust.worker.compute import Compute
from llamaclust.worker.flow import Neighbours, StageFlow
from llamaclust.worker.service import StageService
from llamaclust.worker.stage_runner import StageRunner
from llamaclust.worker.steps import Counters

TOKEN = ClusterToken("t" * 40)
DEADLINES = Deadlines(sampling_inputs_s=0.2, forward_s=5.0)


def runner_of(model: Model, start: int, end: int) -> StageRunner:
    return StageRunner(ReferenceBackend(), model, start, end, LIMITS)


@dataclass(slots=True)
class Chain:
    """Stages of epoch 1, each behind a server of its own; streams to the first and the last."""

    model_id: str
    runners: list[StageRunner]
    first: Peer
    last: Peer
    forward: ClientStream
    sample: ClientStream

    async def submit(self, microbatch: Microbatch, inputs: SamplingInputs | None) -> None:
        await self.forward.write(encode_hidden(encode_microbatch(microbatch), (), None))
        if inputs is not None:
            await self.sample.write(encode_inputs(inputs))

    async def result(self) -> Result:
        async with deadline("a result", 20.0):
            data = await self.sample.read()
        assert data is not None
        return decode_result(data)


@asynccontextmanager
async def chain(
    model: Model, folder: Path, cuts: Sequence[int] = (0, 1, 3), deadlines: Deadlines = DEADLINES
) -> AsyncIterator[Chain]:
    compute, servers, runners, services = Compute(), [], [], []
    peers = [Peer(f"unix:{folder}/{index}.sock", TOKEN) for index in range(len(cuts) - 1)]
    for index, peer in enumerate(peers):
        runners.append(runner_of(model, cuts[index], cuts[index + 1]))
        service = StageService(f"w{index}")
        last = index + 1 == len(peers)
        after = None if last else Peer(peers[index + 1].address, TOKEN)
        first = Peer(peers[0].address, TOKEN) if last and index else None
        service.add(StageFlow(1, runners[-1], f"w{index}", compute, Counters(), deadlines, Neighbours(after, first)))
        services.append(service)
        servers.append(await Server.start(peer.address, TOKEN, service.handlers))
    sample = peers[-1].open(SAMPLE, epoch=1)
    await sample.opened()
    forward = peers[0].open(FORWARD, epoch=1)
    await forward.opened()
    try:
        yield Chain(model.model_id, runners, peers[0], peers[-1], forward, sample)
    finally:
        await asyncio.gather(*(peer.close() for peer in peers))
        await asyncio.gather(*(server.stop(0.0) for server in servers))
        await asyncio.gather(*(service.remove(1) for service in services))
        compute.close()
