"""Checks that `llamaclust up` of a model with a context of 32k tokens answers recorded requests of coding agents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from support.chat.agents.agents import AGENTS
from support.chat.agents.recordings import recorded
from support.chat.sample_templates import TEMPLATES
from support.clusters.command_line import Cluster, command_line
from support.models.tiny_model import build_tiny_model

CONTEXT = 1 << 15
_TOKENS = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    shape: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64, "vocabulary": 1024}
    template = {"tokenizer.chat_template": TEMPLATES["hermes"]}
    build_tiny_model(path, architecture="qwen2", context=CONTEXT, extra=template, **shape)
    with command_line() as line, line.cluster(path) as cluster:
        yield cluster


def shortened(body: dict[str, Any]) -> dict[str, Any]:
    """Limits the length of an answer, since a random model does not end its answers."""
    own = next((name for name in ("max_completion_tokens", "max_tokens") if name in body), None)
    return body | {own or ("max_output_tokens" if "input" in body else "max_tokens"): _TOKENS}


@pytest.mark.parametrize("name", AGENTS)
def test_recorded_requests_are_answered(name: str, cluster: Cluster) -> None:
    for request in recorded(name):
        body = shortened(request.body) if request.path.startswith("/v1/") and request.body else request.body
        sent = json.dumps(body).encode() if body else None
        reply = cluster.http.request(request.method, request.path, content=sent, headers=request.headers, timeout=120)
        assert reply.status_code == 200, reply.text
        assert '"error"' not in reply.text.replace('"error":null', "")
        if request.path.startswith("/v1/"):
            is_stream = reply.headers["content-type"].startswith("text/event-stream")
            assert is_stream == bool(body.get("stream"))
