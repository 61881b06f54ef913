"""Tests of concurrent handshakes: which connection is dropped, and which one is accepted."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from llamaclust.kernels._native import LinkError
from llamaclust.worker.groups.callers import of_the_most
from llamaclust.worker.groups.handshakes import MOST_HANDSHAKES, Handshakes


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("a", [0]),
        ("ab", [0, 1]),
        ("aab", [0, 1]),
        ("baab", [0, 1, 2, 3]),
        ("abcbb", [1, 3, 4]),
        ("cabba", [1, 2, 3, 4]),
    ],
)
def test_the_host_with_the_most_connections_gives_way(hosts: str, expected: list[int]) -> None:
    assert of_the_most(dict(enumerate(hosts))) == expected


class Parts:
    """Handshakes that the test completes; those of a closed connection fail."""

    def __init__(self) -> None:
        self.proofs: list[asyncio.Future[Any]] = []
        self.failures: list[str] = []
        self._others: list[socket.socket] = []
        self.handshakes = Handshakes(self._prove, lambda error: self.failures.append(str(error)))

    async def _prove(self, connection: socket.socket) -> Any:
        proof: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.proofs.append(proof)
        with connection:
            return await proof

    async def take(self, count: int = 1) -> None:
        for _ in range(count):
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            self._others.append(theirs)
            self.handshakes.take(ours)
        await asyncio.sleep(0)

    async def proven(self) -> Any:
        return await self.handshakes.proven()

    @property
    def ended(self) -> list[int]:
        return [place for place, other in enumerate(self._others) if _is_ended(other)]

    def close(self) -> None:
        for other in self._others:
            other.close()


def _is_ended(other: socket.socket) -> bool:
    try:
        return other.recv(1) == b""
    except BlockingIOError:
        return False


@contextmanager
def handshakes() -> Iterator[Parts]:
    parts = Parts()
    try:
        with parts.handshakes:
            yield parts
    finally:
        for proof in parts.proofs:
            proof.cancel()
        parts.close()


async def test_so_many_run_at_once_and_each_further_one_ends_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "choice", lambda crowd: crowd[len(crowd) // 2])
    with handshakes() as parts:
        await parts.take(MOST_HANDSHAKES)
        assert len(parts.proofs) == MOST_HANDSHAKES and not parts.ended
        await parts.take()
        assert parts.ended == [MOST_HANDSHAKES // 2]
        await parts.take(5)
        assert len(parts.ended) == 6 and len(parts.proofs) == MOST_HANDSHAKES + 6
    assert len(parts.proofs) == MOST_HANDSHAKES + 6


async def test_the_first_proof_is_taken_and_a_newer_one_before_it() -> None:
    with handshakes() as parts:
        await parts.take(3)
        parts.proofs[1].set_result("second")
        assert await parts.proven() == "second"
        parts.proofs[0].set_result("first")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        parts.proofs[2].set_result("third")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await parts.proven() == "third"


async def test_failures_are_told_and_leave_their_places() -> None:
    with handshakes() as parts:
        for turn in range(3 * MOST_HANDSHAKES):
            await parts.take()
            parts.proofs[-1].set_exception(LinkError(f"late {turn}"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert parts.failures == [f"late {turn}" for turn in range(3 * MOST_HANDSHAKES)]
        await parts.take(MOST_HANDSHAKES)
        parts.proofs[-1].set_result("true")
        assert await parts.proven() == "true"


async def test_a_connection_that_gave_way_is_not_taken_whatever_it_proves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first connection's proof arrives together with the next connection. Its client was not told that it is
    accepted, so it tries again."""
    monkeypatch.setattr(secrets, "choice", lambda crowd: crowd[0])
    with handshakes() as parts:
        await parts.take(MOST_HANDSHAKES)
        parts.proofs[0].set_result("gave way")
        await parts.take()
        assert parts.ended[:1] == [0]
        parts.proofs[-1].set_result("true")
        assert await parts.proven() == "true"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await parts.handshakes.proven()


async def test_all_end_with_the_context() -> None:
    with handshakes() as parts:
        await parts.take(5)
        parts.handshakes.__exit__()
        assert parts.ended == [0, 1, 2, 3, 4]
