"""Tests of a cluster on machines that lack the model file, started as by a user: with mutual TLS, and with restarts of
the cluster."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from support.clusters.command_line import Cluster, CommandLine, Running, eventually
from support.clusters.static_cluster import (
    join_port,
    named,
    new_trust,
    ready,
    start_coordinator,
    start_worker,
    token_file,
)
from support.models.tiny_model import build_tiny_model


@pytest.mark.promise
def test_workers_without_the_file_answer_as_the_one_that_has_it(line: CommandLine) -> None:
    model = build_tiny_model(line.folder / "m.gguf", hidden=512, ffn=1024, layers=6)
    with line.cluster(
        model, "whole", workers=[{"name": "a", "threads": 1, "memory_bandwidth_gb_s": 10.0, "int8_gmac_s": 100.0}]
    ) as cluster:
        whole = cluster.answer()
        assert line.run("down", "--cluster", "whole").code == 0
    new_trust(line)
    plan = [{"worker": name, "layers": [2 * i, 2 * i + 2]} for i, name in enumerate("bcd")]
    with ExitStack() as stack:
        for second in (False, True):
            keys = {"workers": named("a", "b", "c", "d"), "plan": plan}
            coordinator = start_coordinator(line, Path("/proc/self/cwd/m.gguf"), **keys)
            port = join_port(coordinator)
            workers = [start_worker(line, port, "a", "--model-dir", line.folder)]
            for name in "bcd":
                workers.append(_elsewhere(stack, line, port, name, fresh=not second))
            with ready(coordinator, line) as cluster:
                assert cluster.answer() == whole
                assert _moved(cluster) == (0, 0) if second else _all_arrived(cluster)
                assert line.run("down").code == 0
            for worker in workers:
                assert worker.wait().code == 0
            told = [worker.err.read_text() for worker in workers]
            assert all("are loaded as epoch" in text for text in told[1:]), told


def _moved(cluster: Cluster) -> tuple[float, float]:
    """Returns the bytes of weights that all workers sent and received."""
    sent, received = (cluster.metric(f"llamaclust_weight_{way}_bytes_total") for way in ("sent", "received"))
    return sent, received


def _all_arrived(cluster: Cluster) -> bool:
    """Waits until the heartbeats have reported all bytes."""

    def told() -> bool:
        sent, received = _moved(cluster)
        return sent >= received > 20_000_000  # more if a worker was lost during its load

    eventually(told, 60.0, "bytes of weights")
    return True


def _elsewhere(stack: ExitStack, line: CommandLine, port: int, name: str, *, fresh: bool) -> Running:
    """Starts a worker in a separate folder, with its own caches."""
    folder = line.folder / name
    if fresh:
        folder.mkdir()
    own = replace(line, folder=folder, _started=[])
    stack.callback(own.end_commands)
    return start_worker(own, port, name, token=token_file(line))
