"""Tests of sampling parameters that a model file recommends: endpoints that use them, and what overrides them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.cluster.client.http import Client
from llamaclust.cluster.launchers.in_process import LocalSettings
from llamaclust.core.sampler.params import SamplingParams
from support.clusters.served import MODEL, ScriptedEngine, client, make_app, says
from support.models.tiny_model import build_tiny_model

RECOMMENDED = {"temperature": 0.6, "top_k": 20, "repeat_penalty": 1.25}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


async def sampling(path: str, body: dict[str, Any], **settings: Any) -> SamplingParams:
    engine = ScriptedEngine(says("a"))
    async with client(make_app(engine, recommended=RECOMMENDED, **settings)) as http:
        reply = await http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return engine.submitted[0].params


@pytest.mark.parametrize(
    ("path", "body", "others"),
    [
        ("/completion", {"prompt": "a"}, {"top_p": 0.95, "min_p": 0.05}),
        ("/api/generate", {"model": MODEL, "prompt": "a"}, {"top_p": 0.9, "min_p": 0.0}),
        ("/api/chat", {"model": MODEL, **CHAT}, {"top_p": 0.9, "min_p": 0.0}),
    ],
)
async def test_endpoints_without_a_standard_of_their_own_take_it(
    path: str, body: dict[str, Any], others: dict[str, float]
) -> None:
    params = await sampling(path, body)
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.6, 20, 1.25)
    assert (params.top_p, params.min_p) == (others["top_p"], others["min_p"])


async def test_openais_endpoints_keep_their_documented_defaults() -> None:
    params = await sampling("/v1/chat/completions", CHAT)
    assert params == SamplingParams(temperature=1.0)


async def test_the_cluster_file_and_the_request_come_first() -> None:
    params = await sampling("/completion", {"prompt": "a", "top_k": 3}, defaults={"temperature": 0.5})
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.5, 3, 1.25)


async def test_the_list_of_models_has_the_sampling_of_a_chat() -> None:
    app = make_app(ScriptedEngine(says("a")), recommended=RECOMMENDED, defaults={"min_p": 0.1, "seed": 3})
    async with client(app) as http:
        entry = (await http.get("/v1/models")).json()["data"][0]
        assert (await http.post("/v1/chat/completions", json={**CHAT, **entry["chat_sampling"]})).status_code == 200
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.25}
    assert entry["chat_sampling"] == expected


def test_a_client_in_this_process_reads_the_file(tmp_path: Path) -> None:
    extra: dict[str, Any] = {"general.sampling.temp": np.float32(0.7), "general.sampling.penalty_last_n": 32}
    path = build_tiny_model(tmp_path / "tiny.gguf", extra=extra)
    with Client.local(path, settings=LocalSettings(context_length=64)) as local:
        chosen = local.chat_sampling()
        assert chosen == {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "penalty_window": 32}
        chosen["max_tokens"] = 1
        assert local.chat([{"role": "user", "content": "a"}], **chosen).finish_reason
