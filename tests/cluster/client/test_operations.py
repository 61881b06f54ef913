"""Tests of the client of a cluster's operations, against other programs' servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llamaclust.cluster.client import operations
from llamaclust.cluster.client.operations import ClusterApi
from llamaclust.core.errors import ClusterStartingError, LlamaclustError

CALLS: dict[str, Callable[[ClusterApi], object]] = {
    "status": ClusterApi.status,
    "context_length": ClusterApi.context_length,
    "requests": ClusterApi.requests,
    "log": lambda api: api.log("a"),
    "waterfall": lambda api: api.waterfall("abcd"),
}
FOREIGN = {
    "a page": b"<html>hello</html>",
    "a list": b"[]",
    "a number": b"7",
    "other fields": b'{"status": {}, "requests": {}, "before": "x", "default_generation_settings": 1}',
    "other types": json.dumps({"status": {"name": 1}, "requests": 2, "lines": 3}).encode(),
    "too much": b'{"status": "' + b"x" * (17 << 20) + b'"}',
    "nothing": b"",
}


class Answering(BaseHTTPRequestHandler):
    body = b""
    length = 0
    status = 200
    stopped: threading.Event

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(self.length or len(self.body)))
        self.end_headers()
        try:
            self.wfile.write(self.body)
            while self.length and not self.stopped.wait(0.05):
                self.wfile.write(b" ")
        except OSError:  # the client has closed the connection
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    servers: list[ThreadingHTTPServer] = []
    stopped = threading.Event()

    def start(body: bytes, length: int = 0, status: int = 200) -> str:
        fields = {"body": body, "length": length, "stopped": stopped, "status": status}
        handler = type("Handler", (Answering,), fields)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    stopped.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("body", FOREIGN.values(), ids=FOREIGN.keys())
def test_other_programs_are_told_apart_in_one_line(
    serve: Callable[..., str], body: bytes, call: Callable[[ClusterApi], object]
) -> None:
    with ClusterApi("cluster home", serve(body), None) as api, pytest.raises(LlamaclustError) as caught:
        call(api)
    assert str(caught.value).startswith("cluster home: ") and len(str(caught.value)) < 500


def test_an_answer_that_drips_has_an_end(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_ANSWER_S", 2.0)
    with ClusterApi("cluster home", serve(b"{", 1 << 20), None) as api, pytest.raises(LlamaclustError) as caught:
        api.requests()
    assert str(caught.value) == "cluster home: the rest of the answer did not arrive in time"


@pytest.mark.parametrize("awaited", ["worker a; it waits for b", "12 MiB", "", None, 7])
def test_what_a_start_waits_for_is_a_field_and_no_part_of_the_message(
    serve: Callable[..., str], awaited: object
) -> None:
    error = {"message": "it starts; it waits for nothing", "code": "cluster_starting", "awaited": awaited}
    there = serve(json.dumps({"error": error}).encode(), status=503)
    with ClusterApi("cluster home", there, None) as api, pytest.raises(ClusterStartingError) as caught:
        api.status()
    assert caught.value.awaited == (awaited if isinstance(awaited, str) else None)
    assert str(caught.value) == "cluster home: it starts; it waits for nothing" and caught.value.http_status == 503
