"""Tests of Ollama's endpoints for models, and of its official client."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from llamaclust.cluster.front.dialects.ollama.models import API_VERSION, ModelDetails
from llamaclust.cluster.front.settings import MAX_COPIES
from llamaclust.cluster.front.text.text_settings import TextSettings
from llamaclust.model.chat.template import ChatTemplate
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from llamaclust.model.ranking import Ranking
from llamaclust.model.tokenizers.pairs import PairForm
from support.clusters import served, tool_chats
from support.clusters.served import CONTEXT, MODEL, ScriptedEngine, client, make_app, says, serving
from support.models.tiny_adapter import build_adapter
from support.models.tiny_model import build_tiny_model

HI = [{"role": "user", "content": "Hi"}]
THINKING = tool_chats.TEMPLATE.replace("opens and", "")


def opened(**settings: Any) -> httpx.AsyncClient:
    return client(make_app(ScriptedEngine(says("The cat.")), **settings))


async def names(http: httpx.AsyncClient) -> list[str]:
    return [model["name"] for model in (await http.get("/api/tags")).json()["models"]]


async def test_a_client_finds_the_server() -> None:
    async with opened() as http:
        assert (await http.get("/")).text == "Ollama is running"
        assert (await http.head("/")).status_code == 200
        for path in ("/api/version", "/api/tags"):
            assert (await http.head(path)).status_code == 200


CLIENT_MINIMUMS = {
    "codex --oss": "0.13.4",  # openai/codex: codex-rs/ollama/src/lib.rs, min_responses_version
    "VS Code's Copilot Chat": "0.6.4",  # microsoft/vscode: ollamaProvider.ts, MINIMUM_OLLAMA_VERSION
    "1Code": "0.14.2",  # 21st-dev/1code: agents-beta-tab.tsx, MINIMUM_OLLAMA_VERSION
}
"""The least version of Ollama that each client accepts from `/api/version`."""
FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "0.12.11": ("/api/chat", {"messages": HI, "stream": False, "logprobs": True}),
    "0.13.3": ("/v1/responses", {"input": "Hi"}),
    "0.14.0": ("/v1/messages", {"messages": HI, "max_tokens": 8}),
    "0.15.5": ("/v1/messages/count_tokens", {"messages": HI}),
    "0.22.0": ("/api/chat", {"messages": HI, "stream": False, "think": "max"}),
}
"""Requests by the first version of Ollama whose `server/routes.go` and `api/types.go` have them."""


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


async def test_the_version_is_at_least_the_minimum_of_each_client() -> None:
    async with opened() as http:
        version = numbers((await http.get("/api/version")).json()["version"])
    assert len(version) == 3
    assert [client for client, least in CLIENT_MINIMUMS.items() if version < numbers(least)] == []


async def test_the_version_is_the_first_that_has_what_is_served() -> None:
    with ChatTemplate(THINKING, "", "") as template:
        async with client(make_app(ScriptedEngine(says("Hi.")), template)) as http:
            for path, body in FEATURES.values():
                reply = await http.post(path, json={"model": MODEL} | body)
                assert reply.status_code == 200, reply.text
    assert numbers(API_VERSION) == max(map(numbers, FEATURES))


async def test_the_served_model_is_listed_with_its_aliases() -> None:
    async with opened(aliases=("gpt:4", "cat")) as http:
        assert await names(http) == [f"{MODEL}:latest", "gpt:4", "cat:latest"]
        (loaded,) = (await http.get("/api/ps")).json()["models"]
        assert loaded["name"] == f"{MODEL}:latest" and loaded["context_length"] == CONTEXT


async def test_show() -> None:
    async with opened() as http:
        for field in ("model", "name"):
            shown = (await http.post("/api/show", json={field: MODEL})).json()
            assert "<|im_start|>" in shown["template"] and shown["capabilities"] == ["completion", "tools", "embedding"]
        assert (await http.post("/api/show", json={})).json() == {"error": "model: is missing"}
        reply = await http.post("/api/show", json={"model": "llama3.2"})
        assert (reply.status_code, reply.json()) == (404, {"error": "model 'llama3.2' not found"})


@pytest.mark.parametrize("ranking", [None, Ranking(PairForm((), (), ()), of_last=False)])
async def test_encoders_and_rerankers_show_only_what_they_can_do(
    ranking: Ranking | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "TextSettings", partial(TextSettings, generates=False, ranking=ranking))
    async with opened() as http:
        shown = (await http.post("/api/show", json={"model": MODEL})).json()
    assert shown["capabilities"] == (["embedding"] if ranking is None else [])


def test_details_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    build_tiny_model(path)
    details = ModelDetails.of(TextSettings("tiny", 8, file=open_model(path)))
    listed, shown = details.listed, details.listed["details"]
    assert shown["family"] == "llama" and listed["size"] == path.stat().st_size and len(listed["digest"]) == 64
    assert details.info["general.parameter_count"] > 0 and shown["parameter_size"][:1].isdigit()
    assert shown["quantization_level"] and details.modified_at > "2020"
    json.dumps(details.info, allow_nan=False)


def test_details_are_those_of_the_model_without_adapters(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "tiny.gguf", quant_type=QuantType.Q8_0)
    adapter = build_adapter(tmp_path / "large.gguf", model, rank=128)
    alone, adapted = (
        ModelDetails.of(TextSettings("tiny", 8, file=Model.open(model, adapters=adapters).plain))
        for adapters in ([], [adapter] * 4)
    )
    assert adapted == alone and alone.listed["details"]["quantization_level"] == "Q8_0"
    assert alone.listed["size"] == model.stat().st_size


async def test_copies_are_names_of_the_served_model() -> None:
    async with opened() as http:
        assert (await http.post("/api/copy", json={"source": MODEL, "destination": "a"})).status_code == 200
        create = {"model": "b", "from": "a:latest", "stream": False}
        assert (await http.post("/api/create", json=create)).json() == {"status": "success"}
        assert await names(http) == [f"{MODEL}:latest", "a:latest", "b:latest"]
        assert (await http.request("DELETE", "/api/delete", json={"model": "a"})).status_code == 200
        assert await names(http) == [f"{MODEL}:latest", "b:latest"]


async def test_copies_that_are_refused() -> None:
    async with opened() as http:
        for body, status in (
            ({"source": "nothing", "destination": "a"}, 404),
            ({"source": MODEL, "destination": "<script>"}, 400),
            ({"source": MODEL, "destination": "../a"}, 400),
            ({"source": MODEL}, 400),
        ):
            reply = await http.post("/api/copy", json=body)
            assert (reply.status_code, [*reply.json()]) == (status, ["error"])
        for number in range(MAX_COPIES + 1):
            reply = await http.post("/api/copy", json={"source": MODEL, "destination": f"a{number}"})
        assert reply.status_code == 507 and len(await names(http)) == MAX_COPIES + 1
        for model, status in ((MODEL, 403), ("nothing", 404)):
            assert (await http.request("DELETE", "/api/delete", json={"model": model})).status_code == status
        changed = {"model": "c", "from": MODEL, "system": "Be brief."}
        assert "system" in (await http.post("/api/create", json=changed)).json()["error"]
    async with opened(strict_model=True) as http:
        reply = await http.post("/api/copy", json={"source": MODEL, "destination": "a"})
        assert reply.status_code == 403 and "api.aliases" in reply.json()["error"]


async def test_nothing_is_downloaded_or_uploaded() -> None:
    async with opened() as http:
        pulled = await http.post("/api/pull", json={"model": MODEL})
        assert [json.loads(line)["status"] for line in pulled.text.splitlines()][-1] == "success"
        refused = await http.post("/api/pull", json={"model": "http://127.0.0.1/model"})
        assert refused.status_code == 403 and "model pull" in refused.json()["error"]
        for path in ("/api/push", "/api/blobs/sha256:00"):
            reply = await http.post(path, json={"model": MODEL})
            assert (reply.status_code, [*reply.json()]) == (403, ["error"])
        assert (await http.head("/api/blobs/sha256:00")).status_code == 404


async def test_keys_and_unknown_paths_have_the_errors_of_ollama() -> None:
    async with opened(api_keys=("secret-key",)) as http:
        reply = await http.get("/api/tags")
        assert reply.status_code == 401 and isinstance(reply.json()["error"], str)
        reply = await http.get("/api/nothing", headers={"Authorization": "Bearer secret-key"})
        assert reply.status_code == 404 and isinstance(reply.json()["error"], str)


async def test_client_of_ollama() -> None:
    async with serving(make_app(ScriptedEngine(says("The cat.")))) as url:
        model = ollama.AsyncClient(host=url)
        assert [entry.model for entry in (await model.list()).models] == [f"{MODEL}:latest"]
        answer = await model.chat(MODEL, messages=HI)
        assert answer.message.content == "The cat." and answer.done and answer.eval_count == len("The cat.") + 1
        parts = [part async for part in await model.generate(MODEL, "Hello", stream=True)]
        assert "".join(part.response for part in parts) == "The cat." and parts[-1].context
        assert (await model.show(MODEL)).capabilities == ["completion", "tools", "embedding"]
        assert (await model.ps()).models[0].context_length == CONTEXT
        await model.copy(MODEL, "other")
        assert (await model.delete("other")).status == "success"
        assert (await model.pull(MODEL)).status == "success"
        with pytest.raises(ollama.ResponseError, match="suffix"):
            await model.generate(MODEL, "a", suffix="b")
