"""The server on the port of the API. It sends short replies while the cluster starts, and runs the app afterwards."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self

import h11
import uvicorn
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from llamaclust.cluster.front.errors import OPENAI, Failure, shape_of_path
from llamaclust.cluster.front.http.connections import ApiPort, HttpConnection, chunk, whole
from llamaclust.cluster.front.http.gates import key_error
from llamaclust.cluster.front.http.page import page_reply
from llamaclust.cluster.front.http.responses import BODY_WRITER, EarlyReplies, JsonResponse, Paths
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.state.events import Event, Report, awaited
from llamaclust.core.errors import ClusterStartingError
from llamaclust.core.process_settings import connections_of_server

_BACKLOG = 128
"""Backlog of the listening sockets, and maximum number of connections that asyncio accepts in one turn."""
_GRACE_S = 1
"""Seconds during which a stopping server still sends data. uvicorn requires a whole number."""
_MOST_EARLY = 64  # Maximum number of connections while the cluster starts.
_HEAD_BYTES = 65536
_NO_HTTP = {431: "head_too_large", 501: "not_supported", 505: "http_version_not_supported"}


def server_config(app: ASGIApp, settings: ApiSettings, port: ApiPort, places: int | None = None) -> uvicorn.Config:
    """Returns uvicorn's configuration. `places` is the maximum number of connections (None: as in `settings`)."""

    class Connection(_Connection):
        room = _ConnectionLimit(settings, settings.max_connections if places is None else places)

    def connect(**given: Any) -> asyncio.Protocol:
        return port.carrying(Connection(**given))

    logging.getLogger("asyncio").setLevel(logging.ERROR)
    return uvicorn.Config(
        app,
        http=connect,  # type: ignore[arg-type]  # uvicorn only calls it, like a class.
        ws="none",
        backlog=_BACKLOG,
        lifespan="off",
        log_config=None,
        log_level="error",  # Clients can cause any number of warnings.
        access_log=False,
        server_header=False,
        proxy_headers=False,  # Any program on this machine could claim another client's address.
        timeout_graceful_shutdown=_GRACE_S,
        # `_ConnectionLimit` closes idle connections earlier, but later than clients and proxies (nginx: 60 s) do.
        timeout_keep_alive=2 * math.ceil(max(settings.head_s, settings.idle_s)),
    )


class _ConnectionLimit:
    """Limits the number of connections of a server. At the limit, the connection that was idle longest is closed."""

    def __init__(self, settings: ApiSettings, most: int) -> None:
        self.places = min(most, connections_of_server())
        self.settings = settings
        self._idle: dict[_Connection, asyncio.TimerHandle] = {}

    def wait(self, connection: _Connection, wait_s: float) -> None:
        """Marks a connection as idle, and closes it unless the head of a request arrives within `wait_s`."""
        timer = self._idle.get(connection)
        if timer is not None:
            timer.cancel()
        self._idle[connection] = connection.loop.call_later(wait_s, self._close, connection)

    def leave(self, connection: _Connection) -> None:
        timer = self._idle.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def make_place(self) -> bool:
        if not self._idle:
            return False
        self._close(next(iter(self._idle)))
        return True

    def _close(self, connection: _Connection) -> None:
        self.leave(connection)
        connection.connections.discard(connection)
        connection.transport.close()


class _Connection(H11Protocol):
    """A connection to a client. The head of a request must arrive within `head_s`."""

    room: ClassVar[_ConnectionLimit]

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._awaits_head = False  # True for a kept connection until the first byte of its next request.
        self._body: _Body | None = None  # Body of the current reply.
        self.conn = self._http = HttpConnection(h11.SERVER, _HEAD_BYTES)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        is_full = len(self.connections) >= self.room.places and not self.room.make_place()
        super().connection_made(transport)
        _end_unread(transport, self.room.settings.unread_s)
        if is_full:
            transport.write(whole(Response(status_code=503, headers={"Retry-After": "1"})))
            transport.close()
        else:
            self.room.wait(self, self.room.settings.head_s)

    def data_received(self, data: bytes) -> None:
        if self._awaits_head:
            self._awaits_head = False
            self.room.wait(self, self.room.settings.head_s)
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.room.leave(self)
        super().connection_lost(exc)
        self._end_body()

    def handle_events(self) -> None:
        before = self.cycle
        self._http.begin_turn()
        super().handle_events()
        if self._http.ended_turn:
            self.transport.pause_reading()
            self.loop.call_soon(self._go_on)
        if self.cycle is not before:
            self._body = _Body(self, self.cycle)
            self.scope["extensions"] = {BODY_WRITER: self._body}  # type: ignore[dict-item]
        if not self._is_idle:
            self.room.leave(self)

    def send_400_response(self, msg: str) -> None:
        """Replies to invalid HTTP, unless the app has already begun to reply. Closes the connection."""
        if self._is_idle or not self.cycle.response_started:
            failure = _no_http(sys.exception())
            self.transport.write(whole(JsonResponse(OPENAI.body(failure), failure.status)))
        self.transport.close()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _go_on(self) -> None:
        if self.transport.is_closing():
            return
        if not self.flow.read_paused:
            self.transport.resume_reading()
        self.handle_events()

    def on_response_complete(self) -> None:
        self._end_body()
        super().on_response_complete()
        if self._is_idle and not self.transport.is_closing():
            self._awaits_head = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
            settings = self.room.settings
            self.room.wait(self, settings.idle_s if self._awaits_head else settings.head_s)

    def takes_body(self, cycle: RequestResponseCycle) -> bool:
        is_sending = cycle.response_started and not (cycle.response_complete or cycle.disconnected)
        is_paused = self.flow.write_paused or cycle.scope["method"] == "HEAD"
        return is_sending and self._http.is_chunked and not is_paused

    def _end_body(self) -> None:
        if self._body is not None:
            self._body.end()
            self._body = None

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete


def _no_http(error: BaseException | None) -> Failure:
    status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
    return Failure(status, f"the request is not valid HTTP: {error}", _NO_HTTP.get(status, "bad_http"))


class _Body:
    """Writes a reply's body. One system call sends all pieces that are written in one turn of the event loop."""

    def __init__(self, connection: _Connection, cycle: RequestResponseCycle) -> None:
        # None once the reply has ended.
        self._reply: tuple[_Connection, RequestResponseCycle] | None = (connection, cycle)
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> bool:
        """Queues a piece of the body. Returns False if the caller must send the piece through ASGI instead."""
        if self._reply is None:
            return False
        connection, cycle = self._reply
        if not connection.takes_body(cycle):
            self.flush()
            return False
        if not self._pieces:
            connection.loop.call_soon(self.flush)
        self._pieces.append(chunk(data))
        return True

    def flush(self) -> None:
        pieces, self._pieces = self._pieces, []
        if pieces and self._reply is not None:
            connection, _ = self._reply
            connection.transport.write(b"".join(pieces))

    def end(self) -> None:
        """Ends the body. Breaks the reference cycle between this object and the connection."""
        self._reply = None


def _end_unread(transport: asyncio.Transport, unread_s: float) -> None:
    """Makes the kernel close the connection if the client accepts no data for `unread_s`."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Available on Linux.
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unread_s * 1000))


class StartingReplies:
    """Replies to requests while the cluster starts. The API later uses the same listening sockets."""

    def __init__(self, port: ApiPort, settings: ApiSettings, report: Report, *, is_live: bool = False) -> None:
        """`is_live` makes `/live` reply with status 200 instead of 503."""
        self._settings = settings
        self._is_live = is_live
        self._report = report
        self._awaited = ""
        self._port = port
        self._servers: list[asyncio.Server] = []

    async def __aenter__(self) -> Self:
        loop, app = asyncio.get_running_loop(), Paths(EarlyReplies(self), self._settings.prefix)
        config, state = server_config(app, self._settings, self._port, _MOST_EARLY), ServerState()
        config.load()
        connection: Callable[..., asyncio.Protocol] = config.http_protocol_class
        connect = partial(connection, config=config, server_state=state, app_state={})
        for listener in self._port.listeners:
            self._servers.append(await loop.create_server(connect, sock=listener.dup()))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        while self._servers:
            server = self._servers.pop()
            for listener in server.sockets:
                loop.remove_reader(listener.fileno())
            loop.call_soon(server.close)

    def report(self, event: Event) -> None:
        now = awaited(event)
        self._awaited = self._awaited if now is None else now
        self._report(event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = self._reply(scope)
        reply.headers["Connection"] = "close"  # The next request must reach the API itself.
        await reply(scope, receive, send)

    def _reply(self, scope: Scope) -> Response:
        path, headers = scope["path"], Headers(scope=scope)
        if self._is_live and path == "/live":
            return Response()
        page = page_reply(path, headers) if scope["method"] == "GET" else None
        if page is not None:  # The page shows that the cluster is starting.
            return page
        is_trusted = key_error(headers, self._settings.api_keys) is None
        reason = self._awaited if self._awaited and is_trusted else None
        why = f"; it waits for {reason}" if reason else ""
        failure = Failure(503, f"the cluster is starting: try again later{why}", ClusterStartingError.code)
        body = shape_of_path(path).body(failure)
        if isinstance(body["error"], dict):
            body["error"]["awaited"] = reason
        return JsonResponse(body, failure.status, {"Retry-After": "5"})
