"""Tests of a coordinator that has the model file but no worker: workers without the file get their weights from it, and
answers are those of one worker."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.clusters.command_line import CommandLine, command_line, eventually
from support.network.box import Box
from support.network.distant_cluster import COORDINATOR, SPEED, TOKENS, Answer, DistantCluster, eight

GENERATIONS = eight(TOKENS)
WORKERS = ("a", "b", "c")
PLAN = [{"worker": name, "layers": [2 * place, 2 * place + 2]} for place, name in enumerate(WORKERS)]


@contextmanager
def laptop(box: Box, model: Path, homes: dict[str, Path]) -> Iterator[DistantCluster]:
    """Runs a cluster whose workers cannot see the coordinator's model folder."""
    with command_line() as line, ThreadPoolExecutor() as asking:
        own = line.folder / "laptop" / model.name
        own.parent.mkdir()
        shutil.copy(model, own)
        keys: dict[str, Any] = {"launcher": "static", "listen": "127.0.0.1:8080", "plan": PLAN}
        keys |= {"workers": [{"name": name, **SPEED} for name in WORKERS]}
        file = line.cluster_file(own, "distant", context_length=512, prefix_cache=False, **keys)
        coordinator = line.start("up", file, network=box[COORDINATOR].namespace)
        try:
            coordinator.says("add --device cuda:0")
            workers = {name: start(box, line, name, own.parent, homes.get(name)) for name in WORKERS}
            coordinator.says("distant is ready")
            yield DistantCluster(box, line, coordinator, workers, asking)
        finally:
            line.end_commands()


def start(box: Box, line: CommandLine, name: str, hidden: Path, home: Path | None) -> Any:
    """Starts a worker in a mount namespace where the folder `hidden` is empty. `home` is its LLAMACLUST_HOME."""
    home = home or line.folder / f"home-{name}"
    hide = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "hide")
    token = line.state_dir / ".trust" / "token"
    words = ("--join", f"{box[COORDINATOR].address}:7100", "--name", name, "--threads", "1", "--token-file", token)
    before = (*hide, "env", f"LLAMACLUST_HOME={home}")
    return line.start("worker", *words, before=before, network=box[name].namespace)


def given_bytes(cluster: DistantCluster) -> dict[str, float]:
    """Returns the bytes of weights that each worker received."""
    return {
        each["name"]: (each["heartbeat"] or {"weight_bytes_received": 0})["weight_bytes_received"]
        for each in cluster.status["workers"]
    }


def test_workers_without_the_file_get_it_from_the_coordinator(small_model: Path, small_answers: list[Answer]) -> None:
    with Box((COORDINATOR, *WORKERS)) as box, laptop(box, small_model, {}) as cluster:
        assert cluster.answers(GENERATIONS) == small_answers
        eventually(lambda: all(given_bytes(cluster).values()), 60.0, "weights for each worker")
        assert sum(given_bytes(cluster).values()) < 1.5 * small_model.stat().st_size, "each gets its layers alone"


@pytest.mark.parametrize("folder", ["tiny-q8_0", "a-name-of-its-own"])
def test_a_worker_uses_the_file_that_it_has_downloaded(
    small_model: Path, small_answers: list[Answer], tmp_path: Path, folder: str
) -> None:
    """The file is in the worker's own models directory. The name of its folder does not matter."""
    place = tmp_path / "models" / folder
    place.mkdir(parents=True)
    shutil.copy(small_model, place / small_model.name)
    with Box((COORDINATOR, *WORKERS)) as box, laptop(box, small_model, {"b": tmp_path}) as cluster:
        assert cluster.answers(GENERATIONS) == small_answers
        eventually(lambda: given_bytes(cluster)["a"] > 0, 60.0, "weights for a")
        assert given_bytes(cluster)["b"] == 0
