"""Tests of streams over real connections: keepalive comments, disconnects, many clients; all KV blocks become free."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from llamaclust.cluster.engine.engine import Engine
from support.clusters.served import CONTEXT, SETTINGS, events_of, make_app, real_engine, serving, until

PATHS = ("/v1/completions", "/v1/chat/completions", "/completion")


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "Hello"}]} if "chat" in path else {"prompt": "Hello, you there"}
    length = {"n_predict": 100} if path == "/completion" else {"max_tokens": 100}
    return prompt | length | {"ignore_eos": True} | fields


@asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[tuple[Engine, Any, httpx.AsyncClient]]:
    limits = httpx.Limits(max_connections=200)
    async with (
        real_engine() as (engine, pipeline),
        serving(make_app(engine, **settings)) as address,
        httpx.AsyncClient(base_url=address, trust_env=False, limits=limits, timeout=20) as http,
    ):
        yield engine, pipeline, http


def is_idle(engine: Engine) -> bool:
    counts = engine.scheduler.counts
    return counts.running == counts.waiting == counts.kv_blocks_held == 0


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_shows_signs_of_life(path: str) -> None:
    async with served(keepalive_s=0.02, first_chunk_s=0.02) as (engine, pipeline, http):
        pipeline.gate.clear()
        async with http.stream("POST", path, json=body_of(path, stream=True)) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            assert reply.headers["cache-control"] == "no-cache"
            lines = reply.aiter_lines()
            assert [await anext(lines) for _ in range(4)] == [": waiting", ""] * 2
            pipeline.gate.set()
            rest = [line async for line in lines]
        assert len(events_of("\n".join(rest))) >= 100
        assert is_idle(engine)


ASKED = [*((path, {}) for path in PATHS), *((path, {"n": 3}) for path in PATHS[:2])]


@pytest.mark.parametrize(("path", "fields"), ASKED)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnected_client_frees_its_memory(path: str, fields: dict[str, Any], stream: bool) -> None:
    """Disconnects the client during prefill."""

    async with served(first_chunk_s=5) as (engine, pipeline, http):
        pipeline.gate.clear()
        task = asyncio.create_task(http.post(path, json=body_of(path, stream=stream, **fields)))
        await until(lambda: engine.scheduler.counts.kv_blocks_held > 0)
        task.cancel()
        await until(lambda: is_idle(engine))
        pipeline.gate.set()
        assert (await http.post(path, json=body_of(path))).status_code == 200


@pytest.mark.parametrize(("path", "fields"), ASKED)
async def test_a_client_that_disconnects_within_a_stream(path: str, fields: dict[str, Any]) -> None:
    async with served() as (engine, pipeline, http):
        async with http.stream("POST", path, json=body_of(path, stream=True, **fields)) as reply:
            lines = reply.aiter_lines()  # an iterator that nothing refers to closes the connection
            await anext(lines)
            pipeline.gate.clear()
            await until(lambda: engine.scheduler.counts.running == fields.get("n", 1))
            assert engine.scheduler.counts.kv_blocks_held > 0
        await until(lambda: is_idle(engine))
        pipeline.gate.set()


@pytest.mark.parametrize(("path", "fields"), ASKED)
async def test_a_client_that_disconnects_before_its_whole_answer(path: str, fields: dict[str, Any]) -> None:
    async with served() as (engine, pipeline, http):
        task = asyncio.create_task(http.post(path, json=body_of(path, **fields)))
        while engine.scheduler.counts.running < fields.get("n", 1):  # noqa: ASYNC110  an answer takes few turns
            await asyncio.sleep(0)
        pipeline.gate.clear()
        assert engine.scheduler.counts.kv_blocks_held > 0
        task.cancel()
        await until(lambda: is_idle(engine))
        pipeline.gate.set()


async def test_fifty_clients_with_disconnects() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    choose = random.Random(seed)

    async def one(http: httpx.AsyncClient, path: str, stream: bool, n: int, lines: int | None) -> str:
        extra = {"n": n} if path != "/completion" else {}
        async with http.stream("POST", path, json=body_of(path, stream=stream, **extra)) as reply:
            assert reply.status_code == 200
            taken = []
            async for line in reply.aiter_lines():
                taken.append(line)
                if lines is not None and len(taken) >= lines:
                    return "left"
            return "stayed"

    async with served() as (engine, _, http):
        plans = [
            (choose.choice(PATHS), choose.random() < 0.8, choose.choice((1, 1, 3)), choose.choice((None, 0, 1, 5, 60)))
            for _ in range(50)
        ]
        ends = await asyncio.gather(*(one(http, *plan) for plan in plans))
        assert set(ends) == {"left", "stayed"}
        await until(lambda: is_idle(engine))
        reply = (await http.post("/v1/completions", json=body_of("/v1/completions", seed=1))).json()
        assert reply["usage"]["completion_tokens"] == 100


async def test_a_full_queue_tells_when_to_come_back() -> None:
    async with served() as (engine, pipeline, http):
        pipeline.gate.clear()
        asked = SETTINGS.max_sequences + SETTINGS.max_waiting
        body = body_of("/v1/completions", prompt=list(range(50)), max_tokens=4)
        tasks = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(asked)]
        await until(lambda: engine.scheduler.counts.waiting == SETTINGS.max_waiting)
        full = await http.post("/v1/completions", json=body)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        pipeline.gate.set()
        replies = await asyncio.gather(*tasks)
        assert {reply.status_code for reply in replies} == {200}


async def test_more_requests_than_can_be_held_are_refused() -> None:
    async with served(max_requests=3) as (engine, pipeline, http):
        pipeline.gate.clear()
        body = body_of("/v1/completions")
        tasks = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(3)]
        await until(lambda: engine.scheduler.counts.running == 3)
        busy = await http.post("/v1/completions", json=body)
        assert busy.status_code == 503 and busy.json()["error"]["code"] == "server_busy"
        assert (await http.get("/health")).status_code == 200
        pipeline.gate.set()
        assert {reply.status_code for reply in await asyncio.gather(*tasks)} == {200}
        assert (await http.post("/v1/completions", json=body)).status_code == 200


async def test_more_bytes_than_can_be_held_are_refused() -> None:
    async with served(max_held_bytes=10_000) as (_, _, http):
        large = await http.post("/tokenize", json={"content": "a" * 20_000})
        assert large.status_code == 503 and large.json()["error"]["code"] == "server_busy"
        for _ in range(3):
            assert (await http.post("/tokenize", json={"content": "a" * 9_000})).status_code == 200


async def test_http_answers_what_the_engine_chose() -> None:
    """Checks that a request gives the same tokens and float32 bits, streamed or not, in both APIs."""
    async with served() as (_, _, http):
        ids = list(range(10, 60))
        common = {"temperature": 0.7, "seed": 11, "ignore_eos": True, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
        asked = common | {"prompt": ids, "max_tokens": 40, "logprobs": 0, "return_token_ids": True}
        whole = (await http.post("/v1/completions", json=asked)).json()["choices"][0]
        text = (await http.post("/v1/completions", json=asked | {"stream": True})).text
        parts = [event["choices"][0] for event in events_of(text)[:-1]]
        assert [i for part in parts for i in part["token_ids"]] == whole["token_ids"]
        streamed = [value for part in parts if part["logprobs"] for value in part["logprobs"]["token_logprobs"]]
        assert streamed == whole["logprobs"]["token_logprobs"]
        assert "".join(part["text"] for part in parts) == whole["text"]
        other = common | {"prompt": ids, "n_predict": 40, "return_tokens": True, "repeat_last_n": CONTEXT}
        llamacpp = (await http.post("/completion", json=other)).json()
        assert (llamacpp["tokens"], llamacpp["content"]) == (whole["token_ids"], whole["text"])
