"""Tests of the memory of large replies that are not streamed, per entry of the reply budget."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from starlette.types import Message

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.sampler.results import RowResult, TopLogprobs
from support.clusters.served import CONTEXT, ScriptedEngine, logprob, make_app

_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
_TOKENS = CONTEXT - 60
_CASES: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/completions", {"prompt": "a", "max_tokens": _TOKENS, "logprobs": 20, "n": 40}, 40 * _TOKENS * 21),
    ("/v1/completions", {"prompt": [[5] * 150] * 8, "max_tokens": 0, "echo": True, "logprobs": 128}, 8 * 149 * 129),
    (
        "/v1/chat/completions",
        {**_CHAT, "max_tokens": _TOKENS, "logprobs": True, "top_logprobs": 20, "n": 40},
        40 * _TOKENS * 21,
    ),
    ("/completion", {"prompt": ["a"] * 16, "n_predict": _TOKENS, "n_probs": 100}, 16 * _TOKENS * 101),
    (
        "/v1/responses",
        {
            "input": "a",
            "max_output_tokens": _TOKENS,
            "top_logprobs": 128,
            "include": ["message.output_text.logprobs"],
        },
        _TOKENS * 129,
    ),
    (
        "/api/chat",
        {**_CHAT, "model": "tiny", "options": {"num_predict": _TOKENS}, "logprobs": True, "top_logprobs": 128}
        | {"stream": False},
        _TOKENS * 129,
    ),
]


class _PackedRows(ScriptedEngine):
    """An engine whose top logprobs are packed like those of workers."""

    def _chosen(self, generation: GenerationRequest, token: int, place: int) -> RowResult:
        top = [((place + each) % 256, logprob(place + each)) for each in range(generation.top_logprobs)]
        return replace(super()._chosen(generation, token, place), top_logprobs=TopLogprobs.of(top))


@pytest.mark.parametrize(
    ("path", "body", "entries", "is_kept"),
    [*((*case, False) for case in _CASES), *((*case, True) for case in _CASES[-2:])],
)
async def test_a_whole_reply_takes_few_bytes_an_entry(
    path: str, body: dict[str, Any], entries: int, is_kept: bool
) -> None:
    """Checks that the whole JSON, which is far larger, is never in memory."""
    app = make_app(_PackedRows(lambda generation: [5] * _TOKENS))
    key = "one" if is_kept else ""
    await _post(app, path, {**body, "n": 1} if "n" in body else body, key and "other")  # makes objects only once
    gc.collect()
    tracemalloc.start()
    try:
        size_bytes = await _post(app, path, body, key)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"{path}: {entries} entries, {size_bytes} bytes of JSON, {peak_bytes} bytes at most")
    assert size_bytes > 25 * entries
    assert peak_bytes < 3_000_000 + 30 * entries


async def _post(app: Any, path: str, body: dict[str, Any], key: str) -> int:
    """Returns the reply's size in bytes and keeps no data. With a key, the reply is kept."""
    size_bytes, statuses, is_read = 0, [], asyncio.Event()
    data = json.dumps(body).encode()

    async def receive() -> Message:
        if is_read.is_set():
            await asyncio.Event().wait()
        is_read.set()
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal size_bytes
        size_bytes += len(message.get("body", b""))
        statuses.append(message.get("status"))

    headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1:8080")]
    headers += [(b"idempotency-key", key.encode())] if key else []
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    await app({**scope, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8080), "scheme": "http"}, receive, send)
    assert statuses[0] == 200
    return size_bytes
