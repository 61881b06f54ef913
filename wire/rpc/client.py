"""The client side of streams. Only this file creates channels, and only `server.py` creates servers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any
from weakref import WeakSet

import grpc
from grpc import aio

from llamaclust.core.bounds import line
from llamaclust.core.errors import DeadlineError, ProtocolError, WorkerError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import METHODS, PIECE_BYTES
from llamaclust.wire.rpc.pieces import pieces_of, read_message
from llamaclust.wire.rpc.unix_streams import PREFIX, UnixCall
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Credentials, Identity, KeyPair, check_address
from llamaclust.wire.security.token import ClusterToken

TOKEN_KEY = "llamaclust-token"
EPOCH_KEY = "llamaclust-epoch"
PERMIT_KEY = "llamaclust-permit"
ACCEPTED_KEY = "llamaclust-accepted"
ROOT_CAUSE_KEY = "llamaclust-root-cause"
"""Key of the trailing metadata that names the worker at fault, if that worker is not the peer."""

OPTIONS = (
    ("grpc.max_receive_message_length", PIECE_BYTES),
    ("grpc.max_send_message_length", PIECE_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)

_EOF: Any = aio.EOF  # type: ignore[attr-defined]
_TRANSPORT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
_TRYING = (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)
_CONNECT_S = 20.0
_LONGEST_NAME = 63
_LEAST_ANSWER_S = 1.0  # An answer may take this long on a lossy link or a busy machine.


class StreamBrokenError(WorkerError):
    """The stream broke, or the peer ended it with an error."""


class UnreachableError(StreamBrokenError):
    """The stream's connection failed to open, broke, or no longer transfers data."""


def _options(answer_s: float) -> tuple[tuple[str, int], ...]:
    pings = {
        "grpc.keepalive_time_ms": int(200 * answer_s),
        "grpc.keepalive_timeout_ms": int(1000 * answer_s),
        "grpc.http2.max_pings_without_data": 0,
    }
    return tuple((dict(OPTIONS) | pings).items())


class ClientStream:
    """A bidirectional stream opened by this process. Errors name the peer, or the root cause that the peer reports."""

    _call: Any

    def __init__(self, call: Any, address: str, worker: str | None, most_bytes: int) -> None:
        self._call = call
        self.address = address
        self._worker = worker
        self._most_bytes = most_bytes

    async def opened(self) -> None:
        """Waits until the peer has accepted the stream. Raises StreamBrokenError if the peer does not accept it."""
        metadata = await self._result(self._call.initial_metadata())
        if ACCEPTED_KEY not in dict(metadata or ()):
            raise await self._broken()

    async def write(self, *messages: bytes) -> None:
        """Waits until the network has accepted the messages. Raises StreamBrokenError if the stream has ended."""
        for data in messages:
            for piece in pieces_of(data):
                await self._result(self._call.write(piece))

    def try_write(self, *messages: bytes) -> bool:
        """Sends all messages, or returns False if sending would have to wait. Not allowed while `write` runs."""
        return False

    @property
    def has_message(self) -> bool:
        """True if `read` is known to return at once."""
        return False

    async def read(self) -> bytes | None:
        """Reads a message, or returns None after the stream's end. Raises ProtocolError if the message is too large."""
        try:
            return await read_message(self._read_piece, self._most_bytes)
        except ProtocolError as error:
            error.worker = self._worker
            raise

    async def _read_piece(self) -> Any:
        return await self._result(self._call.read())

    async def done_writing(self) -> None:
        await self._result(self._call.done_writing())

    async def _result(self, operation: Awaitable[Any]) -> Any:
        """Awaits `operation`. Raises StreamBrokenError if gRPC raises an error or cancels the operation."""
        try:
            return await operation
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise await self._broken() from error
        except asyncio.CancelledError:
            # gRPC cancels all tasks that wait for a stream if one task cancels it, or is cancelled while it writes.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise StreamBrokenError(f"the stream to {self.address} was cancelled", worker=self._worker) from None

    def cancel(self) -> None:
        self._call.cancel()

    async def _broken(self) -> StreamBrokenError:
        code = await self._call.code()
        details = line("details", (await self._call.details() or "")[:2000])
        if code in _TRANSPORT:
            kind = UnreachableError if code is grpc.StatusCode.UNAVAILABLE else StreamBrokenError
            return kind(f"connection to {self.address} lost ({details or code.name})", worker=self._worker)
        # gRPC refused a message from the peer because of the message's size.
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return StreamBrokenError(f"{self.address}: {details}", worker=self._worker)
        named = dict(await self._call.trailing_metadata() or ()).get(ROOT_CAUSE_KEY)
        worker = self._worker if named is None else str(named)[:_LONGEST_NAME]
        return StreamBrokenError(details or code.name, worker=worker)


class UnixClientStream(ClientStream):
    _call: UnixCall

    async def write(self, *messages: bytes) -> None:
        if not self._call.try_write(*messages):
            await self._result(self._call.write(*messages))

    async def read(self) -> bytes | None:
        data: Any = await self._result(self._call.read())
        return None if data is _EOF else data

    def try_write(self, *messages: bytes) -> bool:
        return self._call.try_write(*messages)

    @property
    def has_message(self) -> bool:
        return self._call.has_message


class Peer:
    """Connections to one process. With certificates, the process must show the certificate of `principal`. A broken
    connection is noticed within `patience_s` seconds (None: gRPC's own limits), even if nothing is sent."""

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        principal: Principal | None = None,
        patience_s: float | None = None,
    ) -> None:
        check_address(address, credentials)
        self.address = address
        self.principal = principal
        self._answer_s = _CONNECT_S if patience_s is None else max(patience_s / 2, _LEAST_ANSWER_S)
        self._options = OPTIONS if patience_s is None else _options(self._answer_s)
        self._credentials = credentials
        self._channels: list[Any] = []
        self._unix_calls: WeakSet[UnixCall] = WeakSet()
        self._pair: KeyPair | None = None

    @property
    def worker(self) -> str | None:
        return None if self.principal is None else self.principal.worker

    def open(
        self,
        method: str,
        *,
        epoch: int | None = None,
        wait_for_ready: bool = False,
        permit: str | None = None,
        reply_bytes: int | None = None,
    ) -> ClientStream:
        """Opens a stream. `wait_for_ready` lets it wait for an absent server. `reply_bytes` limits a reply's size."""
        most_bytes = METHODS[method].reply_bytes if reply_bytes is None else reply_bytes
        metadata = [] if permit is None else [(PERMIT_KEY, permit)]
        if isinstance(self._credentials, ClusterToken):
            metadata.append((TOKEN_KEY, self._credentials.value))
        if epoch is not None:
            metadata.append((EPOCH_KEY, str(epoch)))
        if self.address.startswith(PREFIX):
            path = self.address.removeprefix(PREFIX)
            unix_call = UnixCall(path, method, tuple(metadata), most_bytes, wait_for_ready=wait_for_ready)
            self._unix_calls.add(unix_call)
            return UnixClientStream(unix_call, self.address, self.worker, most_bytes)
        call = self._channel().stream_stream(method)(metadata=metadata or None, wait_for_ready=wait_for_ready)
        return ClientStream(call, self.address, self.worker, most_bytes)

    async def connected(self) -> None:
        """Waits until the connections are established or have failed. Raises UnreachableError after a deadline."""
        try:
            async with deadline(f"connection to {self.address}", self._answer_s):
                if self.address.startswith(PREFIX):
                    for call in tuple(self._unix_calls):
                        await asyncio.wait([call.connecting])
                    return
                channel = self._channel()
                while (state := channel.get_state(try_to_connect=True)) in _TRYING:
                    await channel.wait_for_state_change(state)
        except DeadlineError as error:
            raise UnreachableError(str(error), worker=self.worker) from error

    def _channel(self) -> Any:
        """Returns a channel that uses this process's current certificate. A new certificate needs a new channel."""
        if not isinstance(self._credentials, Identity):
            if not self._channels:
                self._channels.append(aio.insecure_channel(self.address, options=self._options))
        elif self._pair is not self._credentials.pair:
            from llamaclust.wire.security.tls import TARGET_NAME, channel_credentials

            assert self.principal is not None, "the expected identity"
            self._pair = self._credentials.pair
            options = (*self._options, (TARGET_NAME, self.principal.host(self._credentials.cluster)))
            credentials = channel_credentials(self._credentials)
            self._channels.append(aio.secure_channel(f"dns:///{self.address}", credentials, options=options))
        return self._channels[-1]

    async def close(self) -> None:
        for call in tuple(self._unix_calls):
            call.cancel()
        await asyncio.gather(*(channel.close(grace=None) for channel in self._channels))
