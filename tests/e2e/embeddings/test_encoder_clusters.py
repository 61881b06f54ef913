"""Tests of encoders' embeddings on clusters of real processes: they have the bits of one undisturbed worker."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamaclust.cluster.client.http import Client
from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import context_bounds
from llamaclust.core.errors import UsageError
from llamaclust.core.limits import MAX_BATCH_TOKENS
from llamaclust.model.loader import Model
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


@pytest.mark.parametrize(
    ("name", "trained", "context_length", "limit"),
    [
        ("jina-bert-v2", 700, None, 700),
        ("jina-bert-v2", 6000, None, 4096),
        ("jina-bert-v2", 6000, 5000, 5000),
        ("gemma-embedding", 1500, 900, 900),
    ],
)
def test_all_apis_name_the_longest_input(
    tmp_path: Path, name: str, trained: int, context_length: int | None, limit: int
) -> None:
    model = build_encoder(tmp_path / f"{name}.gguf", name, keys={"context_length": trained})
    keys: dict[str, Any] = {} if context_length is None else {"context_length": context_length}
    with command_line() as line, line.cluster(model, workers=named("a"), **keys) as cluster:
        with httpx.Client(base_url=cluster.api, timeout=120) as http:
            listed = http.get("/v1/models").json()
            assert listed["data"][0]["max_model_len"] == limit
            assert listed["models"][0]["capabilities"] == ["embedding"]
            shown = http.post("/api/show", json={"model": listed["data"][0]["id"]}).json()
            assert shown["parameters"] == f"num_ctx {limit}" and shown["capabilities"] == ["embedding"]
            inputs = [[5] * count for count in (limit, limit + 1)]
            fits, long = (http.post("/v1/embeddings", json={"model": name, "input": ids}) for ids in inputs)
        assert fits.status_code == 200 and fits.json()["usage"]["prompt_tokens"] == limit
        assert long.status_code == 400 and str(limit) in long.text


@pytest.mark.parametrize("name", ["jina-bert-v2", "gemma-embedding"])
def test_a_context_that_an_encoder_cannot_compute_at_once_is_refused(tmp_path: Path, name: str) -> None:
    model = build_encoder(tmp_path / f"{name}.gguf", name, keys={"context_length": 20_000})
    config = ClusterConfig.model_validate(
        {"model": str(model), "workers": [{"name": "a"}], "context_length": MAX_BATCH_TOKENS + 1}
    )
    with Model.open(model) as opened, pytest.raises(UsageError, match=f"at once only {MAX_BATCH_TOKENS} tokens; set"):
        context_bounds(config, opened)
