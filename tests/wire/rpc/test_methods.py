"""Tests of the table of methods: each served method has a row, and other callers, streams and sizes are refused."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.core.errors import LlamaclustError, ProtocolError
from llamaclust.core.limits import MAX_WORKERS
from llamaclust.proto import control_pb2, microbatch_pb2, sampling_pb2
from llamaclust.wire.rpc.cache_flush import CacheFlush
from llamaclust.wire.rpc.client import OPTIONS, Peer, StreamBrokenError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.link_probe import PING_BYTES, measure_link, serve_echo, try_link
from llamaclust.wire.rpc.methods import (
    ECHO,
    FETCH,
    FETCH_STREAMS,
    FORWARD,
    JOIN,
    METHODS,
    PIECE_BYTES,
    SAMPLE,
    served_bytes,
)
from llamaclust.wire.rpc.pieces import pieces_of, read_message
from llamaclust.wire.rpc.server import Handler, Server, ServerStream, _Places
from llamaclust.wire.security.certificate_names import COORDINATOR, Principal
from llamaclust.wire.security.credentials import Identity, Insecure
from llamaclust.wire.security.permits import is_permitted, permit
from llamaclust.worker.service import StageService
from llamaclust.worker.weights.weights import Weights
from support.clusters.members import registry
from support.seed import SEED
from support.wire.trust import A, B, authority

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
MIB = 1 << 20
MOST_BYTES = 300 * MIB
HOSTILE_BYTES = 120 * MIB


@pytest.fixture
def trust(tmp_path: Path) -> Authority:
    return authority(tmp_path)


@asynccontextmanager
async def server_of(trust: Authority, handlers: dict[str, Handler]) -> AsyncIterator[Server]:
    server = await Server.start("127.0.0.1:0", trust.identity(A), handlers)
    try:
        yield server
    finally:
        await server.stop(0.0)


async def test_every_method_that_is_served_has_a_row(trust: Authority) -> None:
    served = {*StageService("a").handlers, *Weights().giver.handlers}
    async with registry(trust) as coordinator:
        assert coordinator.address
    assert served | {JOIN} == METHODS.keys()
    named = (f"/{service.full_name}/{method.name}" for file in (control_pb2, microbatch_pb2, sampling_pb2)
             for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods)  # fmt: skip
    assert {*named} <= METHODS.keys()

    async def handler(stream: ServerStream) -> None: ...

    with pytest.raises(KeyError):
        await Server.start("127.0.0.1:0", Insecure(), {"/llamaclust.v1.Stage/New": handler})


def test_servers_take_no_larger_messages_than_their_methods() -> None:
    assert served_bytes({JOIN: None}) == 1 << 20
    assert served_bytes(StageService("a").handlers) == PIECE_BYTES


# -- who may measure -----------------------------------------------------------------------------------------------


async def test_links_are_measured_with_a_permit_alone(trust: Authority) -> None:
    """A certificate is not enough. A permit for another caller, worker or cluster is not enough either."""
    coordinator, foreign = trust.identity(COORDINATOR), Authority.open(trust.token_file.parent.with_name("other"))
    c = Principal("c")
    async with server_of(trust, {ECHO: serve_echo}) as server:
        for caller, shown in (
            (B, ""),
            (c, permit(coordinator, "b", "a")),
            (B, permit(coordinator, "b", "c")),
            (B, permit(foreign.identity(COORDINATOR), "b", "a")),
            (B, permit(trust.identity(c), "b", "a")),  # The permit is signed by a member.
            (B, "x.y"),
            (B, "." * 4096),
        ):
            peer = Peer(server.address, trust.identity(caller), A)
            with pytest.raises(StreamBrokenError, match="no permit"):
                await try_link(peer, 10.0, shown)
            await peer.close()
        for caller, shown in ((B, permit(coordinator, "b", "a")), (COORDINATOR, "")):
            peer = Peer(server.address, trust.identity(caller), A)
            assert (await measure_link(peer, shown)).round_trip_s > 0
            await peer.close()


def test_a_permit_ends_with_the_certificate_that_signed_it(trust: Authority) -> None:
    from support.wire.trust import expired

    a = trust.identity(A)
    assert is_permitted(a, B, permit(trust.identity(COORDINATOR), "b", "a"))
    assert not is_permitted(a, B, permit(expired(trust, COORDINATOR), "b", "a"))
    assert permit(Insecure(), "b", "a") == "" and is_permitted(Insecure(), B, "")


@pytest.mark.parametrize("method", [ECHO, JOIN, FETCH])
async def test_streams_of_one_caller_are_few_and_places_come_back(trust: Authority, method: str) -> None:
    most = METHODS[method].streams_of_caller

    async def handler(stream: ServerStream) -> None:
        await stream.accept()
        await stream.read()

    async with server_of(trust, {method: handler}) as server:
        shown = permit(trust.identity(COORDINATOR), "b", "a")
        peer = Peer(server.address, trust.identity(B), A)
        other = Peer(server.address, trust.identity(COORDINATOR), A)
        streams = [peer.open(method, permit=shown) for _ in range(most)]
        for stream in streams:
            await stream.opened()
        with pytest.raises(StreamBrokenError, match="which is the limit"):
            await peer.open(method, permit=shown).opened()
        await other.open(method).opened()
        await streams[0].done_writing()
        assert await streams[0].read() is None
        await peer.open(method, permit=shown).opened()
        await asyncio.gather(peer.close(), other.close())


def test_every_worker_of_the_largest_cluster_can_fetch_from_one_source() -> None:
    places = _Places(FETCH, METHODS[FETCH])
    with ExitStack() as streams:
        for caller in (Principal(f"w{number}") for number in range(MAX_WORKERS)):
            for _ in range(FETCH_STREAMS):
                streams.enter_context(places.taken(caller))


async def test_measurements_share_one_buffer(trust: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CacheFlush] = []
    monkeypatch.setattr(CacheFlush, "__init__", _counted(made, CacheFlush.__init__))
    async with server_of(trust, {ECHO: serve_echo}) as server:
        peers = [Peer(server.address, trust.identity(COORDINATOR), A) for _ in range(3)]
        streams = [peer.open(ECHO) for peer in peers[:2]]
        for stream in streams:
            for _ in range(2):
                await stream.write(bytes(PING_BYTES))
                assert await stream.read()
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*(peer.close() for peer in peers))
    assert len(made) == 1


def _counted(made: list[CacheFlush], make: Callable[..., None]) -> Callable[..., None]:
    def counted(self: CacheFlush, *arguments: int) -> None:
        made.append(self)
        make(self, *arguments)

    return counted


# -- sizes ---------------------------------------------------------------------------------------------------------


async def test_messages_of_any_size_pass_in_pieces() -> None:
    source = random.Random(SEED)
    print(f"seed {SEED}")
    sizes = [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, source.randrange(5 * PIECE_BYTES)]
    messages = [source.randbytes(size) for size in sizes]
    pieces = iter([piece for message in messages for piece in pieces_of(message)] + [EOF])

    async def read() -> object:
        return next(pieces)

    assert [await read_message(read, max(sizes)) for _ in messages] == messages
    assert await read_message(read, 1) is None


async def test_a_message_that_has_begun_is_read_whole() -> None:
    sizes = [0, 1, 2 * PIECE_BYTES + 1]
    pieces = iter([piece for size in sizes for piece in pieces_of(bytes(size))] + [EOF])

    async def read() -> object:
        return next(pieces)

    stream = ServerStream(SimpleNamespace(read=read), max(sizes))
    for size in sizes:
        await stream.begin()
        assert await stream.read() == bytes(size)
    await stream.begin()
    assert await stream.read() is None


@pytest.mark.parametrize(
    ("pieces", "read_at_most"),
    [(10, 3), (0, 1), (2, 3)],
    ids=["no end", "one piece", "ends within a message"],
)
async def test_a_message_that_is_too_large_is_not_read_to_its_end(pieces: int, read_at_most: int) -> None:
    left = [bytes(PIECE_BYTES)] * pieces + [b"12", EOF] if pieces != 2 else [bytes(PIECE_BYTES), EOF]
    taken = []

    async def read() -> object:
        taken.append(left.pop(0))
        return taken[-1]

    with pytest.raises(ProtocolError):
        await read_message(read, 2 * PIECE_BYTES if pieces else 1)
    assert len(taken) <= read_at_most


# -- memory under attack -------------------------------------------------------------------------------------------


def _peak_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def _attacked(folder: Path, to: Connection) -> None:
    """Serves the coordinator's method and all methods of a worker. Sends the addresses, and then the growth of the
    process's peak memory."""

    trust = authority(folder)

    async def serve() -> None:
        async with registry(trust) as there:
            handlers = {FORWARD: _reading, SAMPLE: _reading, ECHO: serve_echo, FETCH: _reading}
            worker = await Server.start("127.0.0.1:0", trust.identity(A), handlers)
            before = _peak_bytes()
            to.send((there.address, worker.address))
            await asyncio.to_thread(to.recv)
            to.send(_peak_bytes() - before)
            await worker.stop(0.0)

    asyncio.run(serve())


async def _reading(stream: ServerStream) -> None:
    """Reads a stream like a stage whose largest frame has 1 MiB."""
    stream.limit(1 * MIB)
    await stream.accept()
    while await stream.read() is not None:
        pass


@pytest.fixture
def attacked(trust: Authority, tmp_path: Path) -> Iterator[tuple[Connection, str, str]]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_attacked, args=(tmp_path, theirs))
    process.start()
    assert ours.poll(60)
    coordinator, worker = ours.recv()
    yield ours, coordinator, worker
    process.kill()
    process.join()


def _flood(address: str, method: str, caller: Identity, expected: Principal, streams: int) -> None:
    """Opens streams that each send one unsplit message of 120 MiB."""

    async def flood() -> None:
        data = bytes(HOSTILE_BYTES)
        peers = [_unbounded(Peer(address, caller, expected)) for _ in range(streams)]
        calls = [peer._channel().stream_stream(method)(metadata=(("llamaclust-epoch", "1"),)) for peer in peers]
        async with deadline("a flood", 120):
            await asyncio.gather(*(_sent(call, data) for call in calls), return_exceptions=True)
        await asyncio.gather(*(peer.close() for peer in peers))

    asyncio.run(flood())


def _unbounded(peer: Peer) -> Peer:
    options = dict(OPTIONS) | {"grpc.max_send_message_length": -1}
    peer._options = tuple(options.items())
    return peer


async def _sent(call: Any, data: bytes) -> None:
    with suppress(grpc.RpcError, asyncio.InvalidStateError, LlamaclustError):
        await call.write(data)
        await call.read()


@pytest.mark.parametrize(
    ("method", "caller"),
    [(JOIN, B), (FORWARD, B), (SAMPLE, COORDINATOR), (FETCH, B), (ECHO, B)],
    ids=lambda value: str(value).rpartition("/")[2],
)
def test_hostile_messages_do_not_take_memory(
    attacked: tuple[Connection, str, str], trust: Authority, method: str, caller: Principal
) -> None:
    told, coordinator, worker = attacked
    address, expected = (coordinator, COORDINATOR) if method == JOIN else (worker, A)
    _flood(address, method, trust.identity(caller), expected, 12)
    told.send("enough")
    assert told.poll(30)
    grown = told.recv()
    print(f"{method}: {grown / MIB:.0f} MiB")
    assert grown < MOST_BYTES


async def test_a_reply_that_is_too_large_names_its_worker(trust: Authority) -> None:
    """Replies are one gRPC message, or pieces, or larger than agreed but within the method's limit."""

    async def hostile(stream: ServerStream) -> None:
        await stream.accept()
        await stream.write(bytes(8 * MIB))

    async def unasked(stream: ServerStream) -> None:
        await stream.accept()
        await stream._context.write(bytes(HOSTILE_BYTES))

    for handler, reply_bytes in ((hostile, 4 * MIB), (hostile, 100), (unasked, None)):
        server = await Server.start("127.0.0.1:0", trust.identity(A), {SAMPLE: handler})
        peer = Peer(server.address, trust.identity(COORDINATOR), A)
        stream = peer.open(SAMPLE, epoch=1, reply_bytes=reply_bytes)
        with pytest.raises((ProtocolError, StreamBrokenError)) as caught:
            await stream.read()
        assert caught.value.worker == "a" or handler is unasked, caught.value
        await peer.close()
        await server.stop(0.0)
    assert replace(METHODS[SAMPLE], streams=1).streams == 1
