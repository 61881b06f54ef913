"""A fake of the Kubernetes API by which the chart's Job reads and creates Secrets."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from support.kubernetes.charts import NAMESPACE, Manifest, one
from support.kubernetes.local_pods import LocalPod

_ACCOUNT = "token-of-the-account"
_ROOT_CA = {"kind": "ConfigMap", "metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": ""}}


class FakeApi(ThreadingHTTPServer):
    """An API server of one namespace's Secrets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.secrets: dict[str, Manifest] = {}
        self.permits = True

    def data(self, name: str) -> dict[str, str]:
        return {key: base64.b64decode(value).decode() for key, value in self.secrets[name]["data"].items()}

    def make_secrets(self, manifests: Sequence[Manifest], folder: Path) -> str:
        """Runs the chart's Job against this server and returns its output."""
        spec = one(manifests, "Job", "secrets")["spec"]["template"]["spec"]
        pod = LocalPod("secrets", "127.0.0.1", spec, (*manifests, _ROOT_CA), folder, {})
        (pod.volume("account") / "token").write_text(_ACCOUNT)
        arguments = [word for word in pod.main["args"] if not word.startswith("--api=")]
        return pod.run({**pod.main, "args": [*arguments, f"--api=http://127.0.0.1:{self.server_port}"], "env": []})


class _Handler(BaseHTTPRequestHandler):
    server: FakeApi

    def do_GET(self) -> None:
        secret = self.server.secrets.get(self.path.rpartition("/")[2])
        self._reply(200 if secret else 404, secret)

    def do_POST(self) -> None:
        assert self.path == f"/api/v1/namespaces/{NAMESPACE}/secrets", self.path
        secret = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = secret["metadata"]["name"]
        if name in self.server.secrets:
            self._reply(409, None)
            return
        texts = secret.pop("stringData")
        secret["data"] = {key: base64.b64encode(text.encode()).decode() for key, text in texts.items()}
        self.server.secrets[name] = secret
        self._reply(201, secret)

    def _reply(self, status: int, content: dict[str, Any] | None) -> None:
        if self.headers["Authorization"] != f"Bearer {_ACCOUNT}" or not self.server.permits:
            status, content = 403, None
        body = json.dumps(content or {"kind": "Status", "code": status}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def fake_api() -> Iterator[FakeApi]:
    server = FakeApi()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
