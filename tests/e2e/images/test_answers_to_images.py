"""Tests of questions about images with `llamaclust up`: one and two workers give the same answers, and image rows are
computed once."""

from __future__ import annotations

import io
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.clusters.command_line import Cluster, command_line, float32
from support.clusters.static_cluster import named
from support.models.tiny_model import build_tiny_model
from support.models.vision.tiny_projectors import TEXT_WIDTH, build_projector

CONTEXT = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds a model with its projector beside it."""
    folder = tmp_path_factory.mktemp("model")
    build_projector(folder / "mmproj-tiny.gguf", "idefics3")
    return build_tiny_model(folder / "tiny.gguf", hidden=TEXT_WIDTH, heads=4, layers=4, context=CONTEXT)


def image(seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 44, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64encode(out.getvalue()).decode()}"}}


def question(cluster: Cluster, *parts: Any) -> dict[str, Any]:
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0, "logprobs": True}
    reply = cluster.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def logprobs(answer: dict[str, Any]) -> list[float]:
    return float32([token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]])


def cached(answer: dict[str, Any]) -> int:
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def answers(cluster: Cluster) -> list[list[float]]:
    """Checks token counts and prefix hits, and returns the answers' logprobs."""
    first = question(cluster, image(1), "What is this?")
    assert first["usage"]["prompt_tokens"] > 16 * 13, "12 tiles and an overview of 16 rows"
    again = question(cluster, image(1), "And now another question")
    assert cached(first) < cached(again) and cached(again) >= 16 * 12, "a second question to the same image"
    other = question(cluster, image(2), "What is this?")
    assert cached(other) < 64, "the text before the image"
    assert logprobs(other) != logprobs(first)
    low = question(cluster, {**image(1), "image_url": {**image(1)["image_url"], "detail": "low"}}, "What is this?")
    assert low["usage"]["prompt_tokens"] < first["usage"]["prompt_tokens"] // 4
    both = question(cluster, image(2), "differs from", image(1), "in what?")
    return [logprobs(answer) for answer in (first, again, other, low, both)]


@pytest.mark.promise
def test_answers_of_one_and_of_two_workers_are_equal(model: Path) -> None:
    found = []
    for names in ("a", "ab"):
        with command_line() as line, line.cluster(model, workers=named(*names), context_length=CONTEXT) as cluster:
            entry = cluster.http.get("/v1/models").json()["data"][0]
            assert entry["capabilities"] == {"vision": True}
            assert cluster.http.get("/props").json()["modalities"]["vision"] is True
            assert "vision" in cluster.http.post("/api/show", json={"model": entry["id"]}).json()["capabilities"]
            found.append(answers(cluster))
    assert found[0] == found[1]
