"""A static cluster that `up` and `worker` commands start, on loopback with mutual TLS."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamaclust.cluster.membership.authority import Authority, trust_folder
from support.clusters.command_line import Cluster, CommandLine, Running, eventually

ANY_PORT = {"listen": "127.0.0.1:0", "members": "127.0.0.1:0"}
SPEED = {"memory_bandwidth_gb_s": 10.0, "int8_gmac_s": 100.0}


def named(*names: str) -> list[dict[str, Any]]:
    """Returns workers of a cluster file, whose speeds are given and not measured."""
    return [{"name": name, **SPEED} for name in names]


def start_coordinator(line: CommandLine, model: Path, **keys: Any) -> Running:
    values = {"launcher": "static", "join": ANY_PORT, "workers": named("a", "b", "c"), "objective": "throughput"}
    return line.start("up", line.cluster_file(model, **{**values, **keys}))


def join_port(coordinator: Running) -> int:
    """Returns the enrolment port that `up` prints."""
    coordinator.says("worker --join ")
    found = re.search(r"--join \S+:(\d+)", coordinator.err.read_text())
    assert found is not None
    return int(found[1])


def token_file(line: CommandLine, name: str = "tiny") -> Path:
    return trust_folder(line.cluster_dir(name)) / "token"


def new_trust(line: CommandLine, name: str = "tiny") -> Authority:
    """Creates the certificate authority that a first start would make."""
    line.cluster_dir(name).mkdir(parents=True, exist_ok=True)
    return Authority.open(line.cluster_dir(name) / "trust")


def start_worker(line: CommandLine, port: int, name: str, *options: str | Path, token: Path | None = None) -> Running:
    secret = () if "--insecure" in options else ("--token-file", token or token_file(line))
    fixed = ("--join", f"127.0.0.1:{port}", "--name", name, "--threads", "1")
    return line.start("worker", *fixed, *secret, *options)


@contextmanager
def ready(coordinator: Running, line: CommandLine, name: str = "tiny") -> Iterator[Cluster]:
    """Yields the cluster as soon as it is ready; the caller ends it and its workers."""
    coordinator.says(f"{name} is ready")
    record = json.loads((line.cluster_dir(name) / "cluster.json").read_text())
    cluster = Cluster(coordinator, name, record["api"], record["pid"])
    with cluster.http:
        yield cluster


def logged(running: Running, text: str, times: int = 1, within_s: float = 120.0) -> None:
    eventually(
        lambda: running.err.read_text().count(text) >= times, within_s, f"{times} x {text!r}: {running.err.read_text()}"
    )
