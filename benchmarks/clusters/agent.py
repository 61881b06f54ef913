"""A coding agent's conversation: time to first token of its turns, relative to a prompt that no cache holds.

    python benchmarks/clusters/agent.py MODEL.gguf [--system 20000] [--turns 30] [--workers 2] [--api openai anthropic]

The system prompt has about so many tokens and begins with a line that differs in each request, as the billing header of
Claude Code does in Anthropic's form; in OpenAI's form nothing differs. Each turn adds the last answer with a tool call
and the tool's result. The model's metadata is written again with a context that all of it fits in.

Prints seconds of the first turn, of a prompt of the same length with another beginning, and of the follow-up turns
(median, slowest), with the share of cached tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from running import Layout, running

from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, write_gguf

_DEADLINE_S = 600.0
_TOKENS_A_WORD = 1.3
_ANSWER_TOKENS = 16
_WORDS = (
    "read",
    "write",
    "the",
    "file",
    "line",
    "of",
    "code",
    "test",
    "run",
    "build",
    "error",
    "name",
    "class",
    "open",
)
_PARAMETERS = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}


def words(source: Random, tokens: int) -> str:
    return " ".join(source.choices(_WORDS, k=round(tokens / _TOKENS_A_WORD)))


def write_long(model: Path, out: Path, context: int) -> None:
    """The same weights with a longer context: what is said beyond the trained one does not matter here."""
    opened = open_model(model)
    key = f"{opened.metadata_str('general.architecture')}.context_length"
    tensors = opened.tensors.values()
    sources = [TensorSource(tensor.name, tensor.quant_type, tensor.shape, tensor.read) for tensor in tensors]
    write_gguf(out, {**opened.metadata, key: context}, sources)


@dataclass(slots=True)
class Conversation:
    """Turns in the internal form: text of the user, calls and results."""

    system: str
    turns: list[tuple[str, str]] = field(default_factory=list)  # path that is read, and its contents

    def openai(self, model: str, number: int) -> tuple[str, dict[str, Any]]:
        del number
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": "Fix the failing test."},
        ]
        for at, (path, text) in enumerate(self.turns):
            function = {"name": "read", "arguments": json.dumps({"path": path})}
            messages += [
                {
                    "role": "assistant",
                    "content": "I read it.",
                    "tool_calls": [{"id": f"call_{at}", "type": "function", "function": function}],
                },
                {"role": "tool", "tool_call_id": f"call_{at}", "content": text},
            ]
        tool = {"type": "function", "function": {"name": "read", "parameters": _PARAMETERS}}
        return "/v1/chat/completions", {
            **_asked(model),
            "messages": messages,
            "tools": [tool],
            "stream_options": {"include_usage": True},
        }

    def anthropic(self, model: str, number: int) -> tuple[str, dict[str, Any]]:
        header = f"x-anthropic-billing-header: cc_version=2.1.0; cch={number:05x};"
        system = [{"type": "text", "text": header}, {"type": "text", "text": self.system}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Fix the failing test."}]
        for at, (path, text) in enumerate(self.turns):
            call = {"type": "tool_use", "id": f"toolu_{at}", "name": "read", "input": {"path": path}}
            result = {"type": "tool_result", "tool_use_id": f"toolu_{at}", "content": text}
            messages += [
                {"role": "assistant", "content": [{"type": "text", "text": "I read it."}, call]},
                {"role": "user", "content": [result]},
            ]
        tool = {"name": "read", "input_schema": _PARAMETERS}
        return "/v1/messages", {**_asked(model), "system": system, "messages": messages, "tools": [tool]}


def _asked(model: str) -> dict[str, Any]:
    return {"model": model, "max_tokens": _ANSWER_TOKENS, "temperature": 0, "stream": True}


APIS: dict[str, Callable[[Conversation, str, int], tuple[str, dict[str, Any]]]] = {
    "openai": Conversation.openai,
    "anthropic": Conversation.anthropic,
}


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds to the first token, and tokens of the prompt."""

    first_s: float
    prompt_tokens: int
    cached_tokens: int


async def take_turn(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Turn:
    begun_s, first_s, usage = time.monotonic(), 0.0, dict[str, int]()
    async with client.stream("POST", path, json=body) as reply:
        if reply.is_error:
            raise SystemExit(f"{path}: {reply.status_code} {(await reply.aread())[:400].decode()}")
        async with aclosing(_events(reply)) as events:
            async for event in events:
                if not first_s and _has_token(event):
                    first_s = time.monotonic() - begun_s
                usage |= _usage(event)
    return Turn(first_s, usage.get("prompt", 0), usage.get("cached", 0))


async def _events(reply: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    async for line in reply.aiter_lines():
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)


def _has_token(event: dict[str, Any]) -> bool:
    """Of the answer, or of a call in it."""
    if event.get("type") == "content_block_delta":
        return True
    return any(
        choice["delta"].keys() - {"role"} and any(choice["delta"].values()) for choice in event.get("choices", ())
    )


def _usage(event: dict[str, Any]) -> dict[str, int]:
    usage = event.get("usage") or event.get("message", {}).get("usage") or {}
    if "prompt_tokens" in usage:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return {"prompt": usage["prompt_tokens"], "cached": cached}
    if "cache_read_input_tokens" in usage and "input_tokens" in usage:
        cached = usage["cache_read_input_tokens"] or 0
        return {"prompt": usage["input_tokens"] + cached, "cached": cached}
    return {}


async def converse(client: httpx.AsyncClient, api: str, model: str, system: int, turns: int) -> None:
    source = Random(f"{api} {system} {turns}")
    conversation = Conversation(f"You are a coding agent. {words(source, system)}")
    made = []
    for number in range(turns):
        made.append(await take_turn(client, *APIS[api](conversation, model, number)))
        conversation.turns.append((f"src/file{number}.py", words(source, 100)))
    conversation.system = f"Another one. {conversation.system}"
    cold = await take_turn(client, *APIS[api](conversation, model, turns))
    _print(api, made, cold)


def _print(api: str, turns: Sequence[Turn], cold: Turn) -> None:
    follow = [turn.first_s for turn in turns[1:]]
    share = sum(turn.cached_tokens for turn in turns[1:]) / max(1, sum(turn.prompt_tokens for turn in turns[1:]))
    print(
        f"{api:10}{turns[0].first_s:9.2f}{cold.first_s:9.2f}{median(follow):9.3f}{max(follow):9.3f}"
        f"{median(follow) / cold.first_s:9.3f}{share:8.3f}   {turns[0].prompt_tokens} to {cold.prompt_tokens} tokens",
        flush=True,
    )


async def run(model: Path, apis: Sequence[str], system: int, turns: int, workers: int) -> None:
    context = (system + 400 * turns + 4096) // 1024 * 1024
    with TemporaryDirectory(prefix="llamaclust-agent-") as folder:
        long = Path(folder) / model.name
        write_long(model, long, context)
        layout = Layout(workers=workers, keys={"context_length": context, "max_sequences": 4})
        async with (
            running(long, layout) as (bench, _),
            httpx.AsyncClient(base_url=bench.api, timeout=_DEADLINE_S, trust_env=False) as client,
        ):
            served = (await client.get("/v1/models")).json()["data"][0]["id"]
            print("api        first s   cold s median s  slowest    ratio  cached")
            for api in apis:
                await converse(client, api, served, system, turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--api", nargs="+", choices=APIS, default=[*APIS])
    parser.add_argument("--system", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    asyncio.run(run(given.model, given.api, given.system, given.turns, given.workers))


if __name__ == "__main__":
    main()
