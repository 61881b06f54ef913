"""Tests of encoders' embeddings on clusters of real processes: they have the bits of one undisturbed worker."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from llamaclust.cluster.client.http import Client
from support.clusters.command_line import Cluster, CommandLine, command_line
from support.clusters.static_cluster import named
from support.models.record_embeddings import TEXTS
from support.models.tiny_encoders import build_encoder

_LONG = " ".join(TEXTS * 4)


def embedded(cluster: Cluster) -> list[bytes]:
    """Returns the embeddings of all texts, for two kinds of pooling."""
    with Client(cluster.api) as client:
        return [
            vector.tobytes() for pooling in ("mean", "cls") for vector in client.embed([*TEXTS, _LONG], pooling=pooling)
        ]


def layers(line: CommandLine, model: Path, *bounds: tuple[int, int]) -> AbstractContextManager[Cluster]:
    names = "abc"[: len(bounds)]
    plan = [{"worker": name, "layers": list(stage)} for name, stage in zip(names, bounds, strict=True)]
    return line.cluster(model, workers=named(*names), plan=plan, context_length=512)


@pytest.mark.promise
@pytest.mark.parametrize(
    ("name", "stages"), [("jina-bert-v2", [(0, 1), (1, 3)]), ("gemma-embedding", [(0, 1), (1, 2), (2, 3)])]
)
def test_several_workers_give_the_bits_of_one(name: str, stages: list[tuple[int, int]], tmp_path: Path) -> None:
    model = build_encoder(tmp_path / f"{name}.gguf", name)
    with command_line() as line:
        with layers(line, model, (0, 3)) as cluster:
            wanted = embedded(cluster)
            assert len(set(wanted)) == len(wanted)
        with layers(line, model, *stages) as cluster:
            assert embedded(cluster) == wanted
