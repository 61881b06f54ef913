"""Tests of Ollama's endpoints of embeddings."""

from __future__ import annotations

import math
from typing import Any

import httpx
import ollama
import pytest

from support.clusters.served import MODEL, client, make_app, real_engine, serving


async def post(path: str, body: dict[str, Any]) -> httpx.Response:
    async with real_engine() as (engine, _), client(make_app(engine)) as http:
        return await http.post(path, json={"model": MODEL} | body)


async def test_a_vector_of_length_1_for_each_text() -> None:
    reply = (await post("/api/embed", {"input": ["Hello", "you"], "truncate": True})).json()
    first, second = reply["embeddings"]
    assert math.hypot(*first) == pytest.approx(1) and len(first) == len(second) and first != second
    assert reply["prompt_eval_count"] > 2 and reply["total_duration"] > 0
    assert (await post("/api/embed", {"input": "you"})).json()["embeddings"] == [second]
    assert (await post("/api/embed", {"input": []})).json()["embeddings"] == []


async def test_embeddings_have_the_length_that_the_model_gave_them() -> None:
    whole = (await post("/api/embeddings", {"prompt": "you"})).json()["embedding"]
    (unit,) = (await post("/api/embed", {"input": "you"})).json()["embeddings"]
    assert [number / math.hypot(*whole) for number in whole] == pytest.approx(unit)
    assert (await post("/api/embeddings", {"prompt": ""})).json() == {"embedding": []}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "input"),
        ({"input": [1]}, "input"),
        ({"input": "a", "dimensions": -1}, "dimensions"),
        ({"input": "a" * 5000}, "input"),
        ({"input": "a", "pooling": "none"}, "a vector for each token"),
    ],
)
async def test_refusals_are_those_of_ollama(fields: dict[str, Any], named: str) -> None:
    reply = await post("/api/embed", fields)
    assert reply.status_code == 400 and named in reply.json()["error"]


async def test_client_of_ollama() -> None:
    async with real_engine() as (engine, _), serving(make_app(engine)) as url:
        reply = await ollama.AsyncClient(host=url).embed(MODEL, ["Hello", "you"], dimensions=3)
        assert [len(vector) for vector in reply.embeddings] == [3, 3] and reply.model == MODEL
