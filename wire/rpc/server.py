"""The server side of streams. Callers are checked before their messages are read. Errors become gRPC status codes."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import grpc
from grpc import aio

from llamaclust.core.bounds import UINT64, one_line
from llamaclust.core.errors import DeadlineError, LlamaclustError, ProtocolError, UsageError
from llamaclust.core.process_settings import connections_of_server
from llamaclust.wire.rpc.client import (
    ACCEPTED_KEY,
    EPOCH_KEY,
    OPTIONS,
    PERMIT_KEY,
    ROOT_CAUSE_KEY,
    TOKEN_KEY,
    StreamBrokenError,
)
from llamaclust.wire.rpc.methods import METHODS, Callers, Method, served_bytes
from llamaclust.wire.rpc.pieces import pieces_of, read_message
from llamaclust.wire.rpc.rejections import HANDSHAKE_S, Handshakes, RefusalLog
from llamaclust.wire.rpc.unix_streams import PREFIX, Serve, UnixContext, UnixServer
from llamaclust.wire.security.certificate_names import COORDINATOR, Principal
from llamaclust.wire.security.credentials import Credentials, Identity, check_address
from llamaclust.wire.security.permits import is_permitted
from llamaclust.wire.security.token import ClusterToken

_EOF: Any = aio.EOF  # type: ignore[attr-defined]
_log = logging.getLogger(__name__)

_CALLS_END_S = 1.0
_CODES: tuple[tuple[type[LlamaclustError], grpc.StatusCode], ...] = (
    (ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (UsageError, grpc.StatusCode.FAILED_PRECONDITION),
    (LlamaclustError, grpc.StatusCode.ABORTED),
)


@contextmanager
def _peer_here() -> Iterator[None]:
    """Raises StreamBrokenError in place of undocumented errors that gRPC raises when the peer or server has gone."""
    try:
        yield
    except aio.BaseError as error:
        raise StreamBrokenError("the peer has gone") from error


class ServerStream:
    """A stream that a peer opened. `peer` is the identity in the peer's certificate, or None without certificates."""

    _context: Any

    def __init__(self, context: Any, most_bytes: int, peer: Principal | None = None) -> None:
        self._context = context
        self._most_bytes = most_bytes
        self._begun: Any = None  # First piece of the next message, if `begin` has received it.
        self.peer = peer

    @property
    def epoch(self) -> int:
        text = str(dict(self._context.invocation_metadata()).get(EPOCH_KEY, ""))
        if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) <= UINT64):
            raise ProtocolError(f"metadata {EPOCH_KEY} is not a number")
        return int(text)

    async def accept(self) -> None:
        with _peer_here():
            await self._context.send_initial_metadata(((ACCEPTED_KEY, "yes"),))

    async def begin(self) -> None:
        """Waits until the next message begins to arrive or the stream ends. The next `read` returns that message."""
        self._begun = await self._piece()

    async def read(self) -> bytes | None:
        return await read_message(self._piece, self._most_bytes)

    async def _piece(self) -> Any:
        begun, self._begun = self._begun, None
        if begun is not None:
            return begun
        with _peer_here():
            return await self._context.read()

    def limit(self, most_bytes: int) -> None:
        self._most_bytes = min(self._most_bytes, most_bytes)

    @property
    def is_local(self) -> bool:
        """True if the stream uses a Unix socket."""
        return False

    @property
    def has_message(self) -> bool:
        return False

    async def write(self, *messages: bytes) -> None:
        with _peer_here():
            for data in messages:
                for piece in pieces_of(data):
                    await self._context.write(piece)


class UnixServerStream(ServerStream):
    _context: UnixContext

    async def read(self) -> bytes | None:
        data = await self._piece()
        return None if data is _EOF else data

    def limit(self, most_bytes: int) -> None:
        super().limit(most_bytes)
        self._context.connection.most_bytes = self._most_bytes

    @property
    def is_local(self) -> bool:
        return True

    @property
    def has_message(self) -> bool:
        return self._context.connection.has_message

    async def write(self, *messages: bytes) -> None:
        with _peer_here():
            await self._context.write(*messages)


Handler = Callable[[ServerStream], Awaitable[None]]


class _Places:
    def __init__(self, name: str, method: Method) -> None:
        self._name = name
        self._method = method
        self._open = Counter[Principal | None]()

    @contextmanager
    def taken(self, caller: Principal | None) -> Iterator[None]:
        """Counts an open stream. Raises ProtocolError if too many are open, either in total or from one caller."""
        method, total = self._method, self._open.total()
        if total >= method.streams or (caller is not None and self._open[caller] >= method.streams_of_caller):
            of_caller = "" if caller is None else f" ({self._open[caller]} of {caller})"
            raise ProtocolError(f"{self._name}: {total} streams are open{of_caller}, which is the limit")
        self._open[caller] += 1
        try:
            yield
        finally:
            self._open[caller] -= 1
            self._open += Counter()  # Removes callers without open streams.


class _Entry:
    def __init__(self, credentials: Credentials, handshakes: Handshakes, refusals: RefusalLog) -> None:
        self._credentials = credentials
        self._handshakes = handshakes
        self._refusals = refusals
        self._calls = set[asyncio.Task[Any]]()  # Tasks of calls in progress.

    @contextmanager
    def call(self, context: Any) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)  # The task belongs to gRPC and continues after the handler.
        with self._handshakes.call(context.peer()) if isinstance(self._credentials, Identity) else nullcontext():
            yield

    async def ended(self) -> None:
        """Waits until cancelled calls have ended. If the event loop closed first, gRPC would print their tracebacks."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=_CALLS_END_S)
        await asyncio.sleep(0)

    async def principal(self, context: Any) -> Principal | None:
        try:
            if isinstance(self._credentials, Identity):
                from llamaclust.wire.security.tls import peer_principal

                return peer_principal(context.auth_context(), self._credentials)
            shown = dict(context.invocation_metadata()).get(TOKEN_KEY)
            if isinstance(self._credentials, ClusterToken) and not self._credentials.matches(shown):
                raise UsageError("the cluster token is missing or wrong")
        except UsageError as error:
            self._refusals.tell(f"a call from {context.peer()}: {error}")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, one_line(str(error)))
            raise AssertionError from error  # Not reached, because `abort` raises.
        return None

    def check(self, callers: Callers, caller: Principal | None, context: Any) -> None:
        """Raises ProtocolError if `callers` excludes `caller`. Leaves the check of Callers.NEIGHBOUR to the stage."""
        if caller is None or callers in (Callers.MEMBERS, Callers.NEIGHBOUR) or caller == COORDINATOR:
            return
        if callers is Callers.COORDINATOR:
            raise ProtocolError(f"{caller} opened a stream that is reserved for {COORDINATOR}")
        shown = str(dict(context.invocation_metadata()).get(PERMIT_KEY, ""))
        if not is_permitted(self._credentials, caller, shown):
            raise ProtocolError(f"{caller} has no permit from the coordinator to measure this link")


def _guarded(name: str, handler: Handler, entry: _Entry) -> Serve:
    method, places = METHODS[name], _Places(name, METHODS[name])

    async def serve(_: Any, context: Any) -> None:
        with entry.call(context):
            await serve_known(context)

    async def serve_known(context: Any) -> None:
        try:
            principal = await entry.principal(context)
            entry.check(method.callers, principal, context)
            kind = UnixServerStream if isinstance(context, UnixContext) else ServerStream
            with places.taken(principal):
                await handler(kind(context, method.request_bytes, principal))
        except aio.AbortError:
            raise
        except LlamaclustError as error:
            code = next(code for kind, code in _CODES if isinstance(error, kind))
            await _end(context, code, str(error), error.worker)
        except Exception as error:  # noqa: BLE001  one failed stream must not stop the server
            _log.exception("a stream failed")
            await _end(context, grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")

    return serve


async def _end(context: Any, code: grpc.StatusCode, why: str, attributed: str | None = None) -> None:
    try:
        await context.abort(code, one_line(why), () if attributed is None else ((ROOT_CAUSE_KEY, attributed),))
    except aio.AbortError:
        raise
    except aio.BaseError as error:
        raise asyncio.CancelledError from error


async def _started(server: Any) -> None:
    """Starts the server. If cancelled, waits until the start is complete and stops the server, as gRPC requires."""
    starting = asyncio.ensure_future(server.start())
    try:
        await asyncio.shield(starting)
    except asyncio.CancelledError:
        await starting
        await server.stop(0.0)
        raise


class Server:
    def __init__(self, server: Any, address: str, handshakes: Handshakes, entry: _Entry) -> None:
        self._server = server
        self._handshakes = handshakes
        self._entry = entry
        self.address = address

    @classmethod
    async def start(
        cls, address: str, credentials: Credentials, handlers: Mapping[str, Handler], handshake_s: float = HANDSHAKE_S
    ) -> Server:
        """Starts a server with a handler for each method. Port 0 means any free port. Raises UsageError on failure."""
        check_address(address, credentials)
        refusals = RefusalLog(_log)
        handshakes = Handshakes(address, handshake_s, refusals)
        entry = _Entry(credentials, handshakes, refusals)
        guarded = {method: _guarded(method, handler, entry) for method, handler in handlers.items()}
        try:
            if address.startswith(PREFIX):
                unix_server = UnixServer(guarded)
                await unix_server.start(address.removeprefix(PREFIX))
                return cls(unix_server, address, handshakes, entry)
            limits = {
                "grpc.server_handshake_timeout_ms": int(1000 * handshake_s),
                "grpc.max_receive_message_length": served_bytes(handlers),
                "grpc.max_allowed_incoming_connections": connections_of_server(),
            }
            server = aio.server(options=tuple((dict(OPTIONS) | limits).items()))
            for method, serve in guarded.items():
                service, _, name = method.strip("/").rpartition("/")
                whole = {name: grpc.stream_stream_rpc_method_handler(serve)}
                server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, whole),))
            if isinstance(credentials, Identity):
                from llamaclust.wire.security.tls import server_credentials

                port: int = server.add_secure_port(address, server_credentials(credentials, handshakes.begun))
            else:
                port = server.add_insecure_port(address)
        except (RuntimeError, OSError) as error:
            raise UsageError(f"cannot listen on {address}: the address is in use or not allowed") from error
        handshakes.port = port
        await _started(server)
        return cls(server, f"{address.rpartition(':')[0]}:{port}", handshakes, entry)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
        self._handshakes.close()
        await self._entry.ended()
