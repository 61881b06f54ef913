"""Tests of threads and NUMA nodes that local workers get, on simulated machines."""

from __future__ import annotations

from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.launchers import worker_settings
from llamaclust.cluster.launchers.worker_settings import numa_nodes, thread_shares
from llamaclust.core.errors import UsageError
from llamaclust.worker.devices.cores import Core, Cores


def _machine(monkeypatch: pytest.MonkeyPatch, *cores_of_node: int) -> None:
    numbers = iter(range(sum(cores_of_node)))
    cores = [Core((next(numbers),), node=node) for node, count in enumerate(cores_of_node) for _ in range(count)]
    monkeypatch.setattr(worker_settings, "read_cores", lambda: Cores(tuple(cores), len(cores)))


def _config(*workers: dict[str, Any], **keys: Any) -> ClusterConfig:
    named = [{"name": name, **worker} for name, worker in zip("abcd", workers, strict=False)]
    return ClusterConfig.model_validate({"model": "m.gguf", "workers": named, **keys})


def _shares(config: ClusterConfig) -> list[tuple[int, int | None]]:
    return list(zip(thread_shares(config).values(), numa_nodes(config).values(), strict=True))


@pytest.mark.parametrize(
    ("workers", "shares"),
    [
        ([{}], [(16, None)]),
        ([{}, {}], [(8, 0), (8, 1)]),
        ([{}, {}, {}], [(5, None)] * 3),
        ([{}, {}, {}, {}], [(4, 0), (4, 0), (4, 1), (4, 1)]),
        ([{"threads": 3}, {}], [(3, None), (8, None)]),
        ([{"numa_node": 1}, {"numa_node": 1, "threads": 2}], [(4, 1), (2, 1)]),
        ([{"numa_node": 0}, {}], [(8, 0), (8, None)]),
    ],
    ids=["one", "one a node", "no multiple", "two a node", "threads are given", "both on one", "one of two is given"],
)
def test_workers_are_divided_over_two_nodes(
    monkeypatch: pytest.MonkeyPatch, workers: list[dict[str, Any]], shares: list[tuple[int, int | None]]
) -> None:
    _machine(monkeypatch, 8, 8)
    assert _shares(_config(*workers)) == shares


def test_workers_share_a_machine_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, 8)
    assert _shares(_config({}, {})) == [(4, None), (4, None)]
    with pytest.raises(UsageError, match="numa_node 1: this process may not use the cores of this node"):
        thread_shares(_config({"numa_node": 1}))


def test_nodes_of_other_machines_are_not_looked_for_here(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, 8)
    config = _config({"numa_node": 3, "threads": 2}, {"threads": 2}, launcher="ray")
    assert _shares(config) == [(2, 3), (2, None)]
