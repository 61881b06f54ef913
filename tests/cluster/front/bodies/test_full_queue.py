"""Tests of many prompts in one request: a full queue refuses them before any work on texts, and an admitted request
does not hold the event loop."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from llamaclust.cluster.front.text.service import TextService
from llamaclust.model.chat.template import ChatTemplate
from llamaclust.model.grammars.checker import GrammarChecker
from llamaclust.model.tokenizers.tokenizer import Tokenizer
from support.clusters.served import SETTINGS, client, make_app, real_engine

_WORDS = "the quick brown fox "
_STRETCH_S = 0.1
_SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
_TOOLS = [{"type": "function", "function": {"name": f"tool{i}", "parameters": _SCHEMA}} for i in range(20)]


def _prompts(count: int, words: int = 4) -> list[str]:
    return [f"{number} {_WORDS * words}" for number in range(count)]


_MANY: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": _prompts(64), "n": 2, "max_tokens": 3}),
    "grammar": ("/v1/completions", {"prompt": _prompts(64), "max_tokens": 3, "guided_json": _SCHEMA}),
    "token ids": ("/v1/completions", {"prompt": [[number, 5, 6] for number in range(1, 65)], "max_tokens": 3}),
    "stops": ("/v1/completions", {"prompt": _prompts(64), "max_tokens": 3, "stop": ["ab" * 400, "cd" * 400]}),
    "biases": (
        "/v1/completions",
        {"prompt": _prompts(64), "max_tokens": 3, "logit_bias": {str(token): 1 for token in range(300)}},
    ),
    "echo": ("/v1/completions", {"prompt": _prompts(64), "max_tokens": 3, "echo": True, "logprobs": 2}),
    "samplers": ("/v1/completions", {"prompt": _prompts(64), "max_tokens": 3, "dry_multiplier": 1.0}),
    "llama.cpp": ("/completion", {"prompt": _prompts(64), "n_predict": 3}),
    "choices": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "n": 128, "max_tokens": 3}),
    "embeddings": ("/v1/embeddings", {"input": _prompts(2048)}),
    "Ollama's embeddings": ("/api/embed", {"model": "tiny", "input": _prompts(1500)}),
    "llama.cpp's embeddings": ("/embedding", {"content": _prompts(1000)}),
}
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tools": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "tools": _TOOLS, "tool_choice": "required"},
    ),
    "responses": ("/v1/responses", {"input": "Hi", "max_output_tokens": 16}),
    "messages": ("/v1/messages", {"model": "tiny", "max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}]}),
    "Ollama's chat": ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}),
    "Ollama's text": ("/api/generate", {"model": "tiny", "prompt": "Hi"}),
}


class Stretches:
    """The longest uninterrupted step of a task on the event loop, in processor time."""

    longest_s = 0.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run = asyncio.events.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began_s = time.thread_time()
            run(handle)
            self.longest_s = max(self.longest_s, time.thread_time() - began_s)

        monkeypatch.setattr(asyncio.events.Handle, "_run", timed)


@pytest.fixture
def stretches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stretches]:
    gc.collect()
    gc.freeze()  # As a server does before it serves.
    yield Stretches(monkeypatch)
    gc.unfreeze()


@pytest.mark.parametrize("running", [0, 8])
@pytest.mark.parametrize("kind", [*_MANY, *_OTHERS])
async def test_a_full_queue_refuses_a_request_before_any_work_on_its_texts(
    kind: str, running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue has no room at all, or room for fewer sequences than prompts."""
    path, body = (_MANY | _OTHERS)[kind]
    if (running and not path.endswith(("completions", "completion"))) or kind in ("choices", "tools"):
        running = 0  # Such a request begins with one sequence.
    worked: list[str] = []
    for place, name in (
        (Tokenizer, "encode"),
        (ChatTemplate, "render_async"),
        (GrammarChecker, "check"),
        (TextService, "prepare"),
    ):
        monkeypatch.setattr(place, name, lambda *_, name=name, **__: worked.append(name))
    async with real_engine(replace(SETTINGS, max_waiting=0)) as (engine, _), client(make_app(engine)) as http:
        engine.scheduler.queues.max_running = running
        reply = await http.post(path, json=body)
        assert reply.status_code == 429 and not worked, reply.text
        assert f"max_waiting is 0, {running} more can run" in reply.text


@pytest.mark.parametrize("waiting", [63, 300])
@pytest.mark.parametrize("kind", _MANY)
async def test_many_prompts_do_not_hold_the_event_loop(kind: str, waiting: int, stretches: Stretches) -> None:
    path, body = _MANY[kind]
    settings = replace(SETTINGS, max_waiting=waiting)
    async with real_engine(settings) as (engine, _), client(make_app(engine), timeout=120) as http:
        stretches.longest_s = 0.0
        reply = await http.post(path, json=body)
        assert reply.status_code in (200, 429), reply.text
        assert stretches.longest_s < _STRETCH_S


async def test_requests_without_computation_need_no_room() -> None:
    async with real_engine(replace(SETTINGS, max_waiting=0)) as (engine, _), client(make_app(engine)) as http:
        engine.scheduler.queues.max_running = 0
        for path, body in (
            ("/v1/completions", {"prompt": _prompts(3), "max_tokens": 0}),
            ("/completion", {"prompt": _prompts(3), "n_predict": 0}),
            ("/api/generate", {"model": "tiny", "prompt": ""}),
        ):
            assert (await http.post(path, json=body)).status_code == 200
