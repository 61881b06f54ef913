"""Authentication between members in one process: an authority, identities, an echo server, an enrolment server."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from llamaclust.cluster.membership.authority import Authority
from llamaclust.cluster.membership.enrolment import EnrolmentServer
from llamaclust.cluster.membership.join_rules import RefusalReason
from llamaclust.wire.rpc.client import ClientStream, Peer
from llamaclust.wire.rpc.methods import JOIN
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.wire.security.certificate_names import COORDINATOR, Principal
from llamaclust.wire.security.credentials import Credentials, Identity, KeyPair

A, B = Principal("a"), Principal("b")


def authority(folder: Path, name: str = "trust") -> Authority:
    return Authority.open(folder / name)


def expired(authority: Authority, principal: Principal) -> Identity:
    """Returns an identity whose certificate ended a minute ago."""
    return authority.identity(principal, timedelta(minutes=-1))


def with_pair(identity: Identity, pair: KeyPair) -> Identity:
    """Returns the identity with another key pair and the same CA."""
    return Identity(identity.ca, identity.cluster, identity.principal, pair)


@dataclass
class Echo:
    """A server that echoes messages and records its callers."""

    server: Server
    callers: list[Principal | None]

    def call(self, credentials: Credentials, principal: Principal = A) -> ClientStream:
        return Peer(self.server.address, credentials, principal).open(JOIN, epoch=1)


@asynccontextmanager
async def echo(credentials: Credentials, handshake_s: float = 2.0) -> AsyncIterator[Echo]:
    callers: list[Principal | None] = []

    async def handler(stream: ServerStream) -> None:
        callers.append(stream.peer)
        await stream.accept()
        while (data := await stream.read()) is not None:
            await stream.write(data)

    server = await Server.start("127.0.0.1:0", credentials, {JOIN: handler}, handshake_s)
    try:
        yield Echo(server, callers)
    finally:
        await server.stop(0.0)


async def answers(stream: ClientStream) -> bool:
    """Tells whether the stream still echoes messages."""
    await stream.write(b"hello")
    return await stream.read() == b"hello"


@asynccontextmanager
async def enrolment(
    authority: Authority, refusal: RefusalReason | None = None, port: int = 7
) -> AsyncIterator[tuple[str, int]]:
    """Yields host and port of an enrolment server."""
    identity = authority.identity(COORDINATOR)
    async with EnrolmentServer("127.0.0.1:0", authority, identity, refusal, port) as server:
        host, _, at = server.address.rpartition(":")
        yield host, int(at)


def refusals(records: list[logging.LogRecord]) -> list[str]:
    """Returns the log messages about refused peers."""
    lines = (record.getMessage() for record in records)
    return [line.removeprefix("refused: ") for line in lines if line.startswith("refused: ")]
