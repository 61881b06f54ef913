"""A fake of the Kubernetes API that a lock needs: clients read one Lease and replace it by its resourceVersion."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "token-of-the-account"
PATH = "/apis/coordination.k8s.io/v1/namespaces/lab/leases/brain"


class LeaseApi(ThreadingHTTPServer):
    """An API server of one Lease, which `lease_api` runs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spec: dict[str, Any] | None = {}  # None: there is no such object
        self.version = 1
        self.permits = True
        self.answers = threading.Event()  # while it is not set, requests hang
        self.answers.set()
        self.changing = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def holder(self) -> str:
        return str((self.spec or {}).get("holderIdentity", ""))

    def change(self, **fields: Any) -> None:
        """Changes the Lease as another client does."""
        with self.changing:
            self.spec = (self.spec or {}) | fields
            self.version += 1


class _Handler(BaseHTTPRequestHandler):
    server: LeaseApi

    def do_GET(self) -> None:
        self._answer(None)

    def do_PUT(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, content: dict[str, Any] | None) -> None:
        server = self.server
        server.answers.wait(20)
        with server.changing:
            if self.headers["Authorization"] != f"Bearer {TOKEN}" or not server.permits:
                self._reply(403, {"kind": "Status", "message": "leases is forbidden"})
            elif self.path != PATH or server.spec is None:
                self._reply(404, {"kind": "Status"})
            elif content is not None and content["metadata"]["resourceVersion"] != str(server.version):
                self._reply(409, {"kind": "Status", "message": "the object has been modified"})
            else:
                if content is not None:
                    server.spec = content["spec"]
                    server.version += 1
                metadata = {"name": "brain", "resourceVersion": str(server.version)}
                self._reply(200, {"kind": "Lease", "metadata": metadata, "spec": server.spec})

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def lease_api() -> Iterator[LeaseApi]:
    server = LeaseApi()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.answers.set()
        server.shutdown()
        server.server_close()
        thread.join()


def lease_values(server: LeaseApi, folder: Path, duration: str) -> dict[str, Any]:
    """Returns the value of `lease` in a cluster file."""
    account = folder / "account"
    account.mkdir(exist_ok=True)
    (account / "token").write_text(f"{TOKEN}\n")
    return {"name": "brain", "namespace": "lab", "duration": duration, "api": server.url, "account": str(account)}
