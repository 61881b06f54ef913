"""The Stage service of a worker: finds the stage that a stream is for."""

from __future__ import annotations

from collections.abc import Mapping

from llamaclust.errors import WireError
from llamaclust.wire.channels import CHOSEN, FORWARD, SAMPLE
from llamaclust.wire.server import Handler, ServerStream
from llamaclust.worker.flow import StageFlow


class StageService:
    """Stages by epoch; two may be there at a time."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._flows: dict[int, StageFlow] = {}

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {FORWARD: self._forward, SAMPLE: self._sample, CHOSEN: self._chosen}

    def __contains__(self, epoch: int) -> bool:
        return epoch in self._flows

    def add(self, flow: StageFlow) -> None:
        assert flow.epoch not in self._flows
        self._flows[flow.epoch] = flow

    async def remove(self, epoch: int) -> None:
        """Frees the stage of an epoch, if it is there."""
        flow = self._flows.pop(epoch, None)
        if flow is not None:
            await flow.close()

    async def _forward(self, stream: ServerStream) -> None:
        await self._flow(stream).forward(stream)

    async def _sample(self, stream: ServerStream) -> None:
        await self._flow(stream).sample(stream)

    async def _chosen(self, stream: ServerStream) -> None:
        await self._flow(stream).chosen(stream)

    def _flow(self, stream: ServerStream) -> StageFlow:
        flow = self._flows.get(stream.epoch)
        if flow is None:
            raise WireError(f"worker {self._worker} holds no stage for epoch {stream.epoch}")
        return flow
