"""An HTTP client with deadlines. httpx limits only single reads, so a server could send bytes slowly for ever."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock, Timer
from typing import Any, Final
from weakref import WeakSet

import httpx

from llamaclust.cluster.client.web_access import proxy_note

HEADERS_S: Final = 60.0
BODY_S: Final = 6 * 3600.0
_HEADERS, _BODY = "receive_response_headers", "receive_response_body"  # Names of httpcore's trace events.
_CONNECTED: Final = ("connect_tcp", "start_tls")


def failure(error: Exception) -> str:
    """Returns the text of an error, with advice if a proxy was used or a host name could not be resolved."""
    text, cause = str(error) or type(error).__name__, error.__cause__ or error.__context__
    if isinstance(error, httpx.HTTPError) and (note := proxy_note(error)):
        return text + note
    while cause is not None and not isinstance(cause, socket.gaierror):
        cause = cause.__cause__ or cause.__context__
    return text if cause is None else f"{text}: no network? HF_ENDPOINT names a mirror of the Hugging Face hub"


class WebClient(httpx.Client):
    """An httpx client with deadlines for the headers and the body of a reply. A missed deadline ends all connections of
    the client, and pending calls raise TransportError."""

    def __init__(self, *, headers_s: float = HEADERS_S, body_s: float = BODY_S, **options: Any) -> None:
        super().__init__(**options)
        self._deadlines_s = {_HEADERS: headers_s, _BODY: body_s}
        self._connections = _Connections()

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        watch = _Watch(self._connections, self._deadlines_s)
        request.extensions = {**request.extensions, "trace": watch}
        try:
            return super().send(request, **options)
        except httpx.TransportError as error:
            if watch.expired:
                what = f"the answer's headers took longer than {self._deadlines_s[_HEADERS]:g} s"
                raise httpx.ReadTimeout(what, request=request) from error
            raise


class _Connections:
    def __init__(self) -> None:
        self._lock = Lock()
        self._sockets: WeakSet[socket.socket] = WeakSet()

    def add(self, stream: Any) -> None:
        with self._lock:
            self._sockets.add(stream.get_extra_info("socket"))

    def cut(self) -> None:
        """Shuts all sockets down, which ends pending reads."""
        with self._lock:
            sockets = list(self._sockets)
        for connection in sockets:
            with suppress(OSError):
                # SSLSocket.shutdown() is not called, because another thread may be using the TLS connection.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Watch:
    def __init__(self, connections: _Connections, deadlines_s: Mapping[str, float]) -> None:
        self._connections, self._deadlines_s = connections, deadlines_s
        self._timer: Timer | None = None
        self.expired = False

    def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        _, phase, state = event.split(".")
        if phase in _CONNECTED and state == "complete":
            self._connections.add(info["return_value"])
        if phase not in self._deadlines_s:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if state == "started":
            self._timer = Timer(self._deadlines_s[phase], self._expire)
            self._timer.daemon = True
            self._timer.start()

    def _expire(self) -> None:
        self.expired = True
        self._connections.cut()
