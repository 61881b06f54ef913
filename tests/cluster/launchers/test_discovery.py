"""Tests of a cluster whose workers find it by multicast DNS, over loopback."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.model.quant_types import QuantType
from support.clusters.command_line import command_line
from support.clusters.static_cluster import SPEED, ready, start_coordinator, token_file
from support.models.tiny_model import build_tiny_model


@pytest.mark.promise
def test_workers_without_an_address_give_the_single_workers_bits(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "tiny.gguf", layers=4, quant_type=QuantType.Q8_0)
    with command_line() as line:
        with line.cluster(model, workers=[{"name": "a", **SPEED}], name="alone") as alone:
            expected = alone.answer()
        join = {"listen": "127.0.0.1:0", "members": "127.0.0.1:0", "discover": True}
        plan = [{"worker": "a", "layers": [0, 1]}, {"worker": "b", "layers": [1, 4]}]
        coordinator = start_coordinator(line, model, join=join, workers=[{"name": n, **SPEED} for n in "ab"], plan=plan)
        coordinator.says("llamaclust worker --discover --name NAME")
        options = ("--discover", "--token-file", token_file(line), "--threads", "1")
        workers = [line.start("worker", "--name", name, *options) for name in "ab"]
        with ready(coordinator, line) as cluster:
            assert cluster.answer() == expected
        for worker in workers:
            worker.says("looking for the coordinator of the token's cluster by multicast DNS")
        line.end_commands()
