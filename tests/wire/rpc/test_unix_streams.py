"""Tests of Unix socket streams, with connections that break, arrive early, or send too much or invalid data."""

from __future__ import annotations

import asyncio
import json
import struct
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from llamaclust.core.errors import UsageError
from llamaclust.wire.rpc.client import Peer, StreamBrokenError, UnreachableError
from llamaclust.wire.rpc.methods import SAMPLE
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.wire.security.token import ClusterToken
from support.seed import SEED

TOKEN = ClusterToken("t" * 40)
CALL, ACCEPTED, MESSAGE, END, STATUS = range(1, 6)


def frame(kind: int, content: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<IB", len(content) if size is None else size, kind) + content


def call(method: str = SAMPLE) -> bytes:
    return frame(CALL, json.dumps([method, [["llamaclust-token", TOKEN.value]]]).encode())


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/s.sock"


async def _echo(stream: ServerStream) -> None:
    await stream.accept()
    while (data := await stream.read()) is not None:
        await stream.write(data)


class Handler:
    """Waits until its stream ends."""

    def __init__(self) -> None:
        self.begun, self.ended = asyncio.Event(), asyncio.Event()
        self.stream: ServerStream | None = None

    async def __call__(self, stream: ServerStream) -> None:
        await stream.accept()
        self.stream = stream
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        frame(CALL, b"{}"),
        frame(CALL, b"\xff"),
        frame(CALL, json.dumps([SAMPLE, [[1]]]).encode()),
        frame(CALL, size=1 << 17),
        frame(MESSAGE, size=(1 << 28) + 1),
        frame(STATUS, b"[]"),
        frame(0),
        call() + call(),
        frame(CALL, b"[" * 60_000),
        frame(MESSAGE, b"x"),
        frame(END),
    ],
)
async def test_a_caller_that_speaks_nonsense_is_cut_off_and_others_are_served(address: str, sent: bytes) -> None:
    server = await Server.start(address, TOKEN, {SAMPLE: _echo})
    reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    writer.write(sent)
    async with asyncio.timeout(60):
        with suppress(ConnectionResetError):
            await reader.read()
    writer.close()
    peer = Peer(server.address, TOKEN)
    stream = peer.open(SAMPLE)
    await stream.write(b"x")
    assert await stream.read() == b"x"
    await peer.close()
    await server.stop(0.0)


@pytest.mark.parametrize(
    "answer",
    [frame(STATUS, b'["NO_CODE", "", []]'), frame(STATUS, b"1"), frame(CALL), frame(9), frame(ACCEPTED, b'["x"]')],
)
async def test_a_server_that_speaks_nonsense_is_a_lost_connection(address: str, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        with suppress(ConnectionResetError):
            await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(serve, address.removeprefix("unix:"))
    async with asyncio.timeout(60):
        with pytest.raises(UnreachableError, match="lost"):
            await Peer(address, TOKEN).open(SAMPLE).opened()
    server.close()


async def test_bytes_come_in_any_pieces(address: str) -> None:
    server = await Server.start(address, TOKEN, {SAMPLE: _echo})
    reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    messages = [b"", b"a", b"b" * 3000, b"", b"c" * 70000]
    data = call() + b"".join(frame(MESSAGE, message) for message in messages) + frame(END)
    source = Random(SEED)
    while data:
        size = source.choice((1, 2, 4, 5, 9, 3000, 40000))
        writer.write(data[:size])
        data = data[size:]
        await writer.drain()
        await asyncio.sleep(0)
    async with asyncio.timeout(60):
        answered = await reader.read()
    expected = b"".join(frame(MESSAGE, message) for message in messages)
    head, rest = answered[: answered.index(expected)], answered[answered.index(expected) + len(expected) :]
    assert head[4] == ACCEPTED
    assert rest == frame(STATUS, b'["OK", "", []]')
    writer.close()
    await server.stop(0.0)


async def test_a_reader_that_does_not_read_holds_its_sender_up(address: str) -> None:
    may_read = asyncio.Event()
    read: list[bytes] = []

    async def slow(stream: ServerStream) -> None:
        await stream.accept()
        await may_read.wait()
        while (data := await stream.read()) is not None:
            read.append(data)

    server = await Server.start(address, TOKEN, {SAMPLE: slow})
    stream = Peer(server.address, TOKEN).open(SAMPLE)
    await stream.opened()
    sent = -1
    with suppress(TimeoutError):
        while sent < 1000:
            sent += 1
            async with asyncio.timeout(1.0):
                await stream.write(sent.to_bytes(4, "little") * (1 << 15))
    assert 32 <= sent < 100  # 4 MiB wait there, and further messages are on the way.
    may_read.set()
    await stream.done_writing()
    assert await stream.read() is None
    assert [int.from_bytes(data[:4], "little") for data in read] == list(range(sent + 1))
    assert all(data == data[:4] * (1 << 15) for data in read)
    await server.stop(0.0)


async def test_a_large_message_that_is_cancelled_on_its_way_ends_the_stream(address: str) -> None:
    handler = Handler()
    server = await Server.start(address, TOKEN, {SAMPLE: handler})
    stream = Peer(server.address, TOKEN).open(SAMPLE)
    writing = asyncio.create_task(stream.write(bytes(1 << 25)))
    await handler.begun.wait()
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    async with asyncio.timeout(60):
        await handler.ended.wait()
        with pytest.raises(StreamBrokenError):
            await stream.read()
    with pytest.raises(StreamBrokenError):
        await stream.write(b"more")
    await server.stop(0.0)


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_a_handler_is_cancelled_where_its_caller_goes(address: str, how: str) -> None:
    handler = Handler()
    server = await Server.start(address, TOKEN, {SAMPLE: handler})
    peer = Peer(server.address, TOKEN)
    stream = peer.open(SAMPLE)
    await stream.opened()
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    if how == "cancel":
        stream.cancel()
    else:
        await peer.close()
    async with asyncio.timeout(60):
        await handler.ended.wait()
        with pytest.raises(StreamBrokenError, match="lost"):
            await reading
    assert handler.stream is not None
    with pytest.raises(StreamBrokenError):
        await handler.stream.write(b"late")
    await server.stop(0.0)


async def test_a_handler_that_is_cancelled_is_no_lost_connection(address: str) -> None:
    """The process of the handler is still there."""

    async def cancelled(stream: ServerStream) -> None:
        await stream.accept()
        raise asyncio.CancelledError

    server = await Server.start(address, TOKEN, {SAMPLE: cancelled})
    stream = Peer(server.address, TOKEN).open(SAMPLE)
    await stream.opened()
    with pytest.raises(StreamBrokenError) as raised:
        await stream.read()
    assert not isinstance(raised.value, UnreachableError)
    await server.stop(0.0)


async def test_a_call_may_wait_for_its_server(address: str) -> None:
    peer = Peer(address, TOKEN)
    with pytest.raises(UnreachableError, match="No such file"):
        await peer.open(SAMPLE).opened()
    stream = peer.open(SAMPLE, wait_for_ready=True)
    opening = asyncio.create_task(stream.opened())
    await asyncio.sleep(0.05)
    assert not opening.done()
    server = await Server.start(address, TOKEN, {SAMPLE: _echo})
    await opening
    await peer.connected()
    await peer.close()
    await server.stop(0.0)
    with pytest.raises(UnreachableError, match="No such file"):
        await Peer(address, TOKEN).open(SAMPLE).opened()


async def test_a_stopped_server_ends_streams_after_its_grace(address: str) -> None:
    handler = Handler()
    server = await Server.start(address, TOKEN, {SAMPLE: handler})
    stream = Peer(server.address, TOKEN).open(SAMPLE)
    await stream.opened()
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    await server.stop(0.2)
    assert loop.time() - begun_s >= 0.19
    with pytest.raises(StreamBrokenError):
        await stream.read()
    await handler.ended.wait()


async def test_a_path_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot listen on unix:"):
        await Server.start(f"unix:{tmp_path}/none/s.sock", TOKEN, {})


async def test_messages_are_handed_on_at_once_while_the_other_side_reads(address: str) -> None:
    may_read = asyncio.Event()

    async def slow(stream: ServerStream) -> None:
        await stream.accept()
        await may_read.wait()
        while (data := await stream.read()) is not None:
            await stream.write(data[:4])

    server = await Server.start(address, TOKEN, {SAMPLE: slow})
    stream = Peer(server.address, TOKEN).open(SAMPLE)
    assert not stream.try_write(b"early")
    await stream.opened()
    assert not stream.try_write(bytes(1 << 20))
    writing = asyncio.create_task(stream.write(b"0000" * (1 << 22)))
    await asyncio.sleep(0)
    assert not stream.try_write(b"within")
    may_read.set()
    await writing
    sent = 0
    while stream.try_write(b"%04d" % (sent + 1) * (1 << 15)) and sent < 1000:
        sent += 1
    assert 0 < sent < 1000, "the system takes some at once, and no such numbers"
    await stream.done_writing()
    assert [await stream.read() for _ in range(sent + 1)] == [b"%04d" % number for number in range(sent + 1)]
    assert await stream.read() is None
    assert not stream.try_write(b"late")
    await server.stop(0.0)


async def test_messages_that_are_sent_together_come_one_by_one(address: str) -> None:
    async def serve(stream: ServerStream) -> None:
        await stream.accept()
        messages = [data for _ in range(6) if (data := await stream.read()) is not None]
        await stream.write(*messages)
        await stream.write(*messages[::-1])

    server = await Server.start(address, TOKEN, {SAMPLE: serve})
    stream = Peer(server.address, TOKEN).open(SAMPLE)
    await stream.opened()
    messages = [b"a", b"", b"b" * 300, b"c" * (1 << 19), b"d", b"e" * (1 << 18)]
    assert stream.try_write(*messages[:3])
    assert not stream.try_write(*messages[3:])
    await stream.write(*messages[3:])
    assert not stream.has_message
    async with asyncio.timeout(60):
        assert [await stream.read() for _ in range(12)] == [*messages, *messages[::-1]]
        assert await stream.read() is None
    await server.stop(0.0)


async def test_a_large_message_whose_reader_goes_in_the_middle_of_it_is_an_error(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(stream: ServerStream) -> None:
        await stream.accept()
        await stream.read()
        with pytest.raises(StreamBrokenError):
            await stream.write(bytes(1 << 25))
        has_failed.set()

    has_failed = asyncio.Event()
    server = await Server.start(address, TOKEN, {SAMPLE: serve})
    reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    writer.write(call() + frame(MESSAGE, b"now"))
    async with asyncio.timeout(60):
        await reader.readexactly(1 << 20)
        writer.transport.abort()
        await has_failed.wait()
    assert not [record for record in caplog.records if record.name == "asyncio"]
    await server.stop(0.0)


async def test_the_end_of_a_stream_within_a_large_message_comes_behind_it(address: str) -> None:
    is_sending = asyncio.Event()

    async def serve(stream: ServerStream) -> None:
        await stream.accept()
        sending = asyncio.create_task(stream.write(b"x" * (1 << 25)))
        await asyncio.sleep(0)
        is_sending.set()
        await stream.read()
        assert not sending.done()
        sending.add_done_callback(lambda task: task.exception())
        raise UsageError("why it failed")

    server = await Server.start(address, TOKEN, {SAMPLE: serve})
    reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    writer.write(call())
    await is_sending.wait()
    writer.write(frame(MESSAGE, b"fail"))
    async with asyncio.timeout(60):
        received = await reader.read()
    head, _, content = received.partition(frame(MESSAGE, size=1 << 25))
    assert head.startswith(struct.pack("<I", len(head) - 5) + bytes([ACCEPTED]))
    status = content[1 << 25 :]
    assert not content[: 1 << 25].strip(b"x") and b"why it failed" in status
    assert status.startswith(struct.pack("<I", len(status) - 5) + bytes([STATUS]))
    writer.close()
    await server.stop(0.0)


async def test_a_caller_that_says_nothing_is_cut_off(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamaclust.wire.rpc.unix_connection.CALL_S", 0.05)
    server = await Server.start(address, TOKEN, {SAMPLE: _echo})
    reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    stream = Peer(server.address, TOKEN).open(SAMPLE)
    await stream.opened()
    async with asyncio.timeout(60):
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
    await stream.write(b"x")
    writer.close()
    await server.stop(0.0)


async def test_many_small_messages_that_nobody_reads_wait_with_the_sender(address: str) -> None:
    handler = Handler()
    server = await Server.start(address, TOKEN, {SAMPLE: handler})
    _, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    writer.write(call())
    await handler.begun.wait()
    writer.write(frame(MESSAGE) * 500_000)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await writer.drain()
    writer.transport.abort()
    await server.stop(0.0)


async def test_a_token_of_lone_surrogates_is_refused(address: str) -> None:
    server = await Server.start(address, TOKEN, {SAMPLE: _echo})
    reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    writer.write(frame(CALL, json.dumps([SAMPLE, [["llamaclust-token", "\ud800"]]]).encode()))
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    assert answer[4] == STATUS and b"UNAUTHENTICATED" in answer
    await server.stop(0.0)
