"""Tests of workers with `--stay`: after `down` and `up` with another model, they join again. One token serves all
clusters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.clusters.command_line import CommandLine, Running, command_line, eventually
from support.models.tiny_model import build_tiny_model
from support.network.box import Box
from support.network.distant_cluster import (
    COORDINATOR,
    SPEED,
    TOKENS,
    Answer,
    DistantCluster,
    eight,
    start_worker,
    undisturbed,
)

GENERATIONS = eight(TOKENS)
WORKERS = ("a", "b")


def start_cluster(box: Box, line: CommandLine, model: Path, name: str, **keys: Any) -> Running:
    """Starts a cluster with some layers on each worker."""
    plan = [{"worker": "a", "layers": [0, 2]}, {"worker": "b", "layers": [2, keys.pop("layers")]}]
    fixed: dict[str, Any] = {"launcher": "static", "listen": "127.0.0.1:8080", "plan": plan, "context_length": 512}
    fixed |= {"workers": [{"name": each, **SPEED} for each in WORKERS], "prefix_cache": False}
    return line.start("up", line.cluster_file(model, name, **fixed, **keys), network=box[COORDINATOR].namespace)


@contextmanager
def staying(line: CommandLine, box: Box, *join: str) -> Iterator[dict[str, Running]]:
    workers = {name: start_worker(box, line, name, "--stay", *join) for name in WORKERS}
    yield workers
    assert all(worker.process.poll() is None for worker in workers.values())


def ends(box: Box, line: CommandLine, coordinator: Running, how: str) -> None:
    if how == "ctrl-c":
        coordinator.press_ctrl_c()
    else:
        line.start("down", network=box[COORDINATOR].namespace).wait()
    coordinator.wait()


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("other") / "other.gguf", layers=4)


@pytest.mark.parametrize("how", ["ctrl-c", "down"])
@pytest.mark.parametrize("join", [(), ("--discover",)], ids=["join", "discover"])
def test_another_model_with_the_same_workers(
    small_model: Path, small_answers: list[Answer], other_model: Path, how: str, join: tuple[str, ...]
) -> None:
    other_answers = undisturbed(other_model, GENERATIONS)
    with Box((COORDINATOR, *WORKERS)) as box, command_line() as line:
        join = join or ("--join", f"{box[COORDINATOR].address}:7100")
        keys: dict[str, Any] = {"join": {"discover": "--discover" in join}}
        first = start_cluster(box, line, small_model, "first", layers=6, **keys)
        with staying(line, box, *join) as workers:
            first.says("first is ready")
            assert DistantCluster(box, line, first, workers, None).answers(GENERATIONS) == small_answers  # type: ignore[arg-type]
            ends(box, line, first, how)
            for worker in workers.values():
                worker.says("this worker waits for the next cluster")
            failed = start_cluster(box, line, other_model, "failed", layers=5, **keys)  # The model has four layers.
            assert failed.wait().code != 0
            second = start_cluster(box, line, other_model, "second", layers=4, **keys)
            second.says("second is ready")
            assert DistantCluster(box, line, second, workers, None).answers(GENERATIONS) == other_answers  # type: ignore[arg-type]
        line.end_commands()


def test_a_worker_that_is_refused_waits_for_a_cluster_that_wants_it(small_model: Path) -> None:
    """The first cluster's file has no worker named c."""
    with Box((COORDINATOR, *WORKERS, "c")) as box, command_line() as line:
        first = start_cluster(box, line, small_model, "first", layers=6)
        join = ("--join", f"{box[COORDINATOR].address}:7100")
        with staying(line, box, *join):
            first.says("first is ready")
            refused = start_worker(box, line, "c", "--stay", *join)
            refused.says("the cluster file has no worker named c")
            ends(box, line, first, "ctrl-c")
            alone = [{"name": "c", **SPEED}]
            file = line.cluster_file(small_model, "third", launcher="static", listen="127.0.0.1:8080", workers=alone)
            third = line.start("up", file, network=box[COORDINATOR].namespace)
            third.says("third is ready")
            eventually(lambda: refused.process.poll() is None, 1.0, "the worker")
        line.end_commands()
