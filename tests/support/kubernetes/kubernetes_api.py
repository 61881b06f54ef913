"""As much of a Kubernetes API server as helm asks when a chart looks up what a namespace has."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_GROUPS = ("apps/v1", "policy/v1", "networking.k8s.io/v1", "monitoring.coreos.com/v1")
_KINDS = {
    "v1": ("Secret", "ConfigMap", "Service", "ServiceAccount", "PersistentVolumeClaim", "Pod"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "policy/v1": ("PodDisruptionBudget",),
    "networking.k8s.io/v1": ("Ingress", "NetworkPolicy"),
    "monitoring.coreos.com/v1": ("ServiceMonitor",),
}


def _plural(kind: str) -> str:
    return (
        kind.lower().removesuffix("y") + "ies"
        if kind.endswith("y")
        else kind.lower() + ("es" if kind[-1] == "s" else "s")
    )


class FakeApi(ThreadingHTTPServer):
    """Answers for the secrets in `secrets`, by name; every other object is not there."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.secrets: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []

    def answer(self, path: str) -> dict[str, Any] | None:
        self.asked.append(path)
        words = path.strip("/").split("/")
        if path == "/version":
            return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            return {"kind": "APIGroupList", "groups": [_group(one) for one in _GROUPS]}
        version = "/".join(words[1:]) if words[0] in ("api", "apis") else ""
        if version in _KINDS:
            resources = [_resource(kind) for kind in _KINDS[version]]
            return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        return self.secrets.get(words[-1]) if words[-2:-1] == ["secrets"] else None


def _group(version: str) -> dict[str, Any]:
    one = {"groupVersion": version, "version": version.partition("/")[2]}
    return {"name": version.partition("/")[0], "versions": [one], "preferredVersion": one}


def _resource(kind: str) -> dict[str, Any]:
    verbs = ["get", "list", "create", "patch"]
    return {"name": _plural(kind), "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}


class _Handler(BaseHTTPRequestHandler):
    server: FakeApi

    def do_GET(self) -> None:
        found = self.server.answer(self.path.partition("?")[0])
        body = json.dumps(found or {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def fake_api(folder: Path) -> Iterator[tuple[FakeApi, Path]]:
    """The server, and a file by which kubectl and helm find it."""
    server = FakeApi()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    cluster = {"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    context = {"name": "fake", "context": {"cluster": "fake", "user": "fake"}}
    config = {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context]}
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config | {"users": [{"name": "fake", "user": {}}], "current-context": "fake"}))
    try:
        yield server, path
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
