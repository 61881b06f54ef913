"""A registry that members join."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llamaclust.cluster.membership.authority import Authority
from llamaclust.cluster.membership.join_rules import JoinSettings
from llamaclust.cluster.membership.registry import Registry
from llamaclust.wire.control.codec import decode_coordinator_message, encode_worker_message
from llamaclust.wire.control.messages import (
    CoordinatorMessage,
    Deadlines,
    Register,
    WorkerMessage,
)
from llamaclust.wire.rpc.client import ClientStream, Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import JOIN
from llamaclust.wire.security.certificate_names import COORDINATOR
from llamaclust.wire.security.credentials import Credentials

ANY = "127.0.0.1:0"


def registry_of(credentials: Credentials, settings: JoinSettings) -> Registry:
    """Creates a registry whose workers have no logs."""
    return Registry(ANY, credentials, lambda name, silent_s: "", settings)


@asynccontextmanager
async def registry(trust: Authority, heartbeat_timeout_s: float = 5.0) -> AsyncIterator[Registry]:
    beats = Deadlines(heartbeat_s=0.1)
    listening = registry_of(trust.identity(), JoinSettings(heartbeat_timeout_s, beats, certify=trust.certify))
    async with listening as registry:
        yield registry


class Joined:
    """A worker's end of its membership stream."""

    def __init__(self, stream: ClientStream) -> None:
        self.stream = stream

    async def say(self, message: WorkerMessage) -> None:
        await self.stream.write(encode_worker_message(message))

    async def hear(self) -> CoordinatorMessage | None:
        async with deadline("an answer", 60):
            data = await self.stream.read()
        return None if data is None else decode_coordinator_message(data)


async def join(registry: Registry, credentials: Credentials, register: Register) -> tuple[Joined, object]:
    """Sends the registration, and returns the worker's end with the first answer."""
    joined = Joined(Peer(registry.address, credentials, COORDINATOR).open(JOIN))
    await joined.say(register)
    return joined, await joined.hear()
