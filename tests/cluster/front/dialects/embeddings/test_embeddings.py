"""Tests of `/v1/embeddings` and `/embedding` with the real engine, whose stages answer at once."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from typing import Any

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from llamaclust.cluster.engine.request_stream import RequestStream
from llamaclust.cluster.front.text.embedder import Vector, normalized
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.errors import QueueFullError
from support.clusters.fakes import hidden_state
from support.clusters.served import CONTEXT, MODEL, client, ids, make_app, real_engine, serving, until


def states(tokens: list[int]) -> list[Vector]:
    return [np.frombuffer(hidden_state(tokens[: end + 1]), "<f4") for end in range(len(tokens))]


def unit(vector: Any) -> list[float]:
    numbers: list[float] = normalized(np.asarray(vector, np.float64)).tolist()
    return numbers


async def post(path: str, body: dict[str, Any], **settings: Any) -> httpx.Response:
    async with real_engine() as (engine, _), client(make_app(engine, **settings)) as http:
        return await http.post(path, json=body)


async def embed(**body: Any) -> Any:
    reply = await post("/v1/embeddings", body)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_openai_reply() -> None:
    first, second = ids("Hello"), ids("The cat")
    reply = await embed(input=["Hello", "The cat"], model=MODEL)
    assert (reply["object"], reply["model"]) == ("list", MODEL)
    assert [(entry["object"], entry["index"]) for entry in reply["data"]] == [("embedding", 0), ("embedding", 1)]
    assert [entry["embedding"] for entry in reply["data"]] == [unit(states(ids_)[-1]) for ids_ in (first, second)]
    tokens = len(first) + len(second)
    assert reply["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ("Hello", [ids("Hello")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([5, "Hello", 7], [[5, *ids("Hello"), 7]]),
        (["Hello", [5, 6]], [ids("Hello"), [5, 6]]),
        ({"prompt_string": "Hello"}, [ids("Hello")]),
        ([{"content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}], [ids("Hello")]),
    ],
)
async def test_forms_of_input(given: Any, tokens: list[list[int]]) -> None:
    reply = await embed(input=given)
    assert [entry["embedding"] for entry in reply["data"]] == [unit(states(each)[-1]) for each in tokens]


async def test_pooling_dimensions_and_base64() -> None:
    rows = states(ids("The cat"))
    mean = np.mean(np.asarray(rows, np.float64), axis=0)
    (entry,) = (await embed(input="The cat", pooling="mean", dimensions=3))["data"]
    np.testing.assert_allclose(entry["embedding"], unit(mean[:3]), rtol=1e-6)
    (entry,) = (await embed(input="The cat", pooling="cls", encoding_format="base64"))["data"]
    assert np.frombuffer(b64decode(entry["embedding"]), "<f4").tolist() == unit(rows[0])


async def test_llamacpp_reply() -> None:
    rows = states(ids("The cat"))
    for path, field in (("/embedding", "content"), ("/embeddings", "input")):
        reply = (await post(path, {field: "The cat", "model": "any"})).json()
        assert reply == [{"index": 0, "embedding": [unit(rows[-1])]}]
    reply = (await post("/embedding", {"content": "The cat", "pooling": "none"})).json()
    assert reply == [{"index": 0, "embedding": [row.tolist() for row in rows]}]
    reply = (await post("/embedding", {"content": "The cat", "embd_normalize": -1})).json()
    assert reply[0]["embedding"] == [rows[-1].tolist()]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": {"content": "Hello"}}, "input"),
        ("/v1/embeddings", {"input": {"content": [{"type": "image_url"}]}}, "input"),
        ("/v1/embeddings", {"input": {"prompt_string": "a", "multimodal_data": ["iVBO"]}}, "input"),
        ("/v1/embeddings", {"input": [{"content": [{"type": "text", "text": "a"}], "role": "user"}]}, "input"),
        ("/v1/embeddings", {"input": {"content": [{"type": "text", "text": "a", "image": "iVBO"}]}}, "input"),
        ("/v1/embeddings", {"input": [5, 100_000]}, "prompt"),
        ("/v1/embeddings", {"input": "a " * (2 * CONTEXT)}, "input"),
        ("/v1/embeddings", {"input": "a", "pooling": "none"}, "pooling"),
        ("/v1/embeddings", {"input": "a", "dimensions": 5}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/embedding", {}, "input"),
        ("/embedding", {"input": "a", "content": "a"}, "input"),
    ],
)
async def test_refusals_name_the_field(path: str, body: dict[str, Any], field: str) -> None:
    reply = await post(path, body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == field


async def test_the_official_client() -> None:
    """Tests OpenAI's client, which requests base64 by default."""
    async with (
        real_engine() as (engine, _),
        serving(make_app(engine)) as address,
        DefaultAsyncHttpxClient(trust_env=False) as http,
        AsyncOpenAI(base_url=f"{address}/v1", api_key="none", http_client=http, max_retries=0) as openai,
    ):
        reply = await openai.embeddings.create(model=MODEL, input=["Hello", "The cat"])
        floats = await openai.embeddings.create(model=MODEL, input="The cat", encoding_format="float", dimensions=4)
    wanted = [unit(states(ids(text))[-1]) for text in ("Hello", "The cat")]
    assert [entry.embedding for entry in reply.data] == wanted
    assert floats.data[0].embedding == wanted[1]


async def test_another_model_is_refused_on_openais_path() -> None:
    assert (await post("/v1/embeddings", {"input": "a", "model": "other"})).status_code == 404


async def test_many_prompts_take_turns_in_a_full_queue() -> None:
    prompts = [[each % 90, 7] for each in range(150)]
    reply = await embed(input=prompts)
    assert [entry["embedding"] for entry in reply["data"]] == [unit(states(prompt)[-1]) for prompt in prompts]


async def test_all_prompts_of_a_request_share_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that the deadline ends a request whose second prompt always finds a full queue."""
    async with real_engine(request_s=0.2) as (engine, _), client(make_app(engine)) as http:
        submit = engine.submit

        def full_after_one(request: GenerationRequest) -> RequestStream:
            if request.request_id.endswith("-0"):
                return submit(request)
            raise QueueFullError("the queue is full", 0.01)

        monkeypatch.setattr(engine, "submit", full_after_one)
        reply = await http.post("/v1/embeddings", json={"input": [[1], [2]]})
        assert reply.status_code == 504 and "timeouts.request" in reply.json()["error"]["message"]


async def test_numbers_of_one_reply_and_of_all_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with real_engine() as (engine, _), client(make_app(engine)) as http:
        monkeypatch.setattr("llamaclust.cluster.front.text.sharing.MAX_REPLY_ENTRIES", 8)  # 40 numbers
        for _ in range(3):  # each reply's reservation is released
            reply = await http.post("/embedding", json={"input": [[1] * 4, [2] * 6], "pooling": "none"})
            assert reply.status_code == 200, reply.text
        refused = await http.post("/embedding", json={"input": [[1] * 4, [2] * 7], "pooling": "none"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "reply_too_large")
        monkeypatch.setattr("llamaclust.cluster.front.text.sharing.MAX_HELD_UNITS", 0)
        async with client(make_app(engine)) as full:
            busy = await full.post("/embedding", json={"input": "a"})
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "5")


async def test_a_client_that_goes_away_ends_its_prompts() -> None:
    """Checks that the prompts end; `real_engine` checks that no KV block stays allocated."""
    async with real_engine() as (engine, pipeline), client(make_app(engine)) as http:
        pipeline.gate.clear()
        waiting = asyncio.create_task(http.post("/v1/embeddings", json={"input": [[1] * 50, [2] * 50]}))
        await until(lambda: len(engine.requests.keys) == 2)
        waiting.cancel()
        await until(lambda: not engine.requests.keys)
        pipeline.gate.set()
