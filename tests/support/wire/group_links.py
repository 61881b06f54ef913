"""Members of a group, each with its own listener, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.core.limits import GROUP_ID_BYTES
from llamaclust.kernels._native import Links, tls_library
from llamaclust.wire.control.groups import GroupMember, GroupOrder
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Credentials
from llamaclust.worker.groups.link_opener import LinkOpener
from llamaclust.worker.groups.listener import LinkListener
from support.seed import SEED

NAMES = "a", "b", "c"
GROUP = bytes(range(GROUP_ID_BYTES))
GATHER_S = 20.0
SOON_S = 1.0
needs_tls = pytest.mark.skipif(not tls_library(), reason="built without OpenSSL")

Given = Callable[[str], Credentials]


async def listening(address: str) -> LinkListener:
    listener = LinkListener()
    await listener.listen(address)
    return listener


@asynccontextmanager
async def listeners(count: int, folder: Path | None = None) -> AsyncIterator[list[LinkListener]]:
    addresses = ["127.0.0.1:0" if folder is None else f"unix:{folder}/{number}" for number in range(count)]
    started = [await listening(address) for address in addresses]
    try:
        yield started
    finally:
        for listener in started:
            await listener.stop()


def order_of(started: list[LinkListener], own: int = 0) -> GroupOrder:
    members = (GroupMember(name, each.address) for name, each in zip(NAMES, started, strict=False))
    return GroupOrder(GROUP, tuple(members), own)


async def opened(started: list[LinkListener], given: Given, seconds: float = GATHER_S) -> list[Links]:
    order = order_of(started)
    return await asyncio.gather(
        *(
            LinkOpener(replace(order, member=own), given(NAMES[own]), listener).open(GATHER_S, seconds)
            for own, listener in enumerate(started)
        )
    )


async def assert_gathers(members: list[Links]) -> None:
    """Asserts that gathers deliver any bits, even in rows larger than a TLS record and the system's buffers."""
    print(f"seed {SEED}")
    made = np.random.default_rng(SEED)
    for step, columns in enumerate((3, 5000, 1 << 20)):
        parts = [made.integers(0, 2**32, (1, columns), np.uint32).view(np.float32) for _ in members]
        borders = [columns * place for place in range(len(members) + 1)]

        def gather(member: int) -> bytes:
            whole = np.zeros((1, borders[-1]), np.float32)  # noqa: B023
            members[member].begin(7, step)  # noqa: B023
            members[member].gather(0, parts[member], whole, borders)  # noqa: B023
            return whole.tobytes()

        found = await asyncio.gather(*(asyncio.to_thread(gather, member) for member in range(len(members))))
        assert found == [np.concatenate(parts, axis=1).tobytes()] * len(members)


def identities(trust: Authority) -> Given:
    return lambda name: trust.identity(Principal(name))
