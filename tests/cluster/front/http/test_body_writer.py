"""Tests of the direct path from pieces of a body to the connection."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from llamaclust.cluster.front.http.connections import chunk
from llamaclust.cluster.front.http.server import _Body


def body(takes: bool = True) -> tuple[_Body, list[bytes]]:
    written: list[bytes] = []
    transport = SimpleNamespace(write=written.append)
    loop = asyncio.get_running_loop()
    connection: Any = SimpleNamespace(takes_body=lambda _: takes, transport=transport, loop=loop)
    return _Body(connection, SimpleNamespace()), written  # type: ignore[arg-type]


async def test_pieces_that_come_together_are_written_together() -> None:
    writer, written = body()
    for data in (b"a", b"bc"):
        assert writer.write(data)
    assert not written
    await asyncio.sleep(0)
    assert written == [chunk(b"a") + chunk(b"bc")]
    assert writer.write(b"d")
    await asyncio.sleep(0)
    assert written[1:] == [chunk(b"d")]


async def test_what_was_taken_goes_out_before_what_another_way_takes() -> None:
    writer, written = body()
    assert writer.write(b"a")
    writer.flush()
    assert written == [chunk(b"a")]
    await asyncio.sleep(0)
    assert written == [chunk(b"a")], "once"


async def test_a_connection_that_takes_nothing_gets_nothing() -> None:
    writer, written = body(takes=False)
    assert not writer.write(b"a")
    writer.flush()
    assert not written
