"""Requests to clusters of every launcher, and the answers of one worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.clusters.command_line import Cluster, CommandLine, command_line
from support.clusters.static_cluster import named
from support.models.tiny_model import build_tiny_model

Answers = list[tuple[list[int], list[float]]]


def model_in(factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(factory.mktemp("model") / "tiny.gguf", context=256)


def answers(cluster: Cluster) -> Answers:
    """Returns a greedy and a seeded answer."""
    return [cluster.answer(), cluster.answer(temperature=0.9, seed=7, max_tokens=24)]


def of_one_worker(model: Path) -> Answers:
    """Returns the answers of one undisturbed worker."""
    with command_line() as line, line.cluster(model, workers=named("a")) as cluster:
        return answers(cluster)


def logs_of(line: CommandLine, name: str) -> str:
    """Returns the output of `llamaclust logs` for a worker."""
    done = line.run("logs", name)
    assert done.code == 0, done.err
    return done.out
