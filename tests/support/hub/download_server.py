"""A web server on this machine that behaves badly on request: drops connections, ignores ranges, is slow or busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Behaviour:
    """The server's behaviour. `drop_after` ends a connection after so many bytes of a body, `drops` times."""

    files: dict[str, bytes] = field(default_factory=dict)
    drop_after: int = 0
    drops: int = 0
    fail_first: int = 0
    ranges: bool = True
    etag: str | None = '"v1"'
    bytes_per_s: float = 0.0
    ranges_asked: list[str | None] = field(default_factory=list)
    requests: int = 0
    drips: int = 0  # so many answers never come to the end of their headers
    at_drip: Callable[[], None] = lambda: None  # is called once in each of these answers
    connections: set[tuple[str, int]] = field(default_factory=set)
    answers: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)  # instead of a file's bytes
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Authorization


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        does = self.behaviour
        does.seen.append((self.command, self.path, self.headers.get("Authorization")))
        does.connections.add(self.client_address)
        if does.drips > 0:
            does.drips -= 1
            return self._drip()
        if self.path in does.answers:
            return self._say(*does.answers[self.path])
        body = does.files.get(self.path)
        if body is None:
            return self.send_error(404)
        if does.fail_first > 0:
            does.fail_first -= 1
            return self.send_error(503)
        is_page = self.path.endswith("/")
        if not is_page:
            does.requests += 1
            does.ranges_asked.append(self.headers.get("Range"))
        start, end = (0, len(body)) if is_page else self._range(does, len(body))
        if start > 0 and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self._answer(body, start, end, is_page)
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def _say(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _drip(self) -> None:
        """Sends header lines until the other side closes the connection."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.behaviour.at_drip()
        while True:
            try:
                self.wfile.write(b"X-More: to come\r\n")
            except OSError:
                return
            time.sleep(0.02)

    def _range(self, does: Behaviour, size: int) -> tuple[int, int]:
        asked = self.headers.get("Range")
        unchanged = self.headers.get("If-Range") in (None, does.etag)
        if not asked or not does.ranges or not unchanged:
            return 0, size
        first, _, last = asked.removeprefix("bytes=").partition("-")
        return int(first), min(size, int(last) + 1) if last else size

    def _answer(self, body: bytes, start: int, end: int, is_page: bool) -> None:
        does = self.behaviour
        is_part = (start, end) != (0, len(body))
        self.send_response(206 if is_part else 200)
        if is_part:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
        elif does.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if does.etag:
            self.send_header("ETag", does.etag)
        self.send_header("Content-Type", "text/html" if is_page else "application/octet-stream")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        rest = body[start:end] if self.command == "GET" else b""
        if not is_page and does.drops > 0 and len(rest) > does.drop_after:
            does.drops -= 1
            self.wfile.write(rest[: does.drop_after])
            self.close_connection = True
            return
        self._write(rest, 0.0 if is_page else does.bytes_per_s)

    def _write(self, rest: bytes, bytes_per_s: float) -> None:
        piece = 8192 if bytes_per_s else max(1, len(rest))
        for at in range(0, len(rest), piece):
            try:
                self.wfile.write(rest[at : at + piece])
            except OSError:
                return
            if bytes_per_s:
                time.sleep(piece / bytes_per_s)

    def log_message(self, *arguments: object) -> None:
        pass


@dataclass
class Server:
    url: str
    does: Behaviour


@contextmanager
def running_server() -> Iterator[Server]:
    """A server on a free port of the loopback interface."""
    behaviour = Behaviour()
    handler = type("BoundHandler", (Handler,), {"behaviour": behaviour})
    web = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    web.daemon_threads = True
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{web.server_port}", behaviour)
    finally:
        web.shutdown()
        thread.join()
        web.server_close()
