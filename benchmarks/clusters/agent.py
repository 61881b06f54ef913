"""A coding agent's session: times to the first tokens of its turns beside that of the first, where nothing is cached.

    python benchmarks/clusters/agent.py MODEL.gguf [--tokens 20000] [--context 32768] [--turns 30] [--workers 2]

Turns go to Anthropic's endpoint as Claude Code sends them: a long system prompt whose billing header differs each time,
tools, all messages so far, results of tools of changing lengths. Prints each turn's prompt, how much of it was cached
and the time to its first token, and the median of the turns behind the first over the first one's (goal: 0.1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import httpx
from running import Layout, running

_DEADLINE_S = 600.0
_ANSWER_TOKENS = 24
_SEED = 7
_WORDS = ("file", "line", "test", "build", "error", "name", "value", "list", "path", "call", "type", "read", "write")
_TOOLS = [
    {
        "name": name,
        "description": f"{name} of the project",
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    }
    for name in ("read_file", "edit_file", "run_tests")
]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one request took."""

    first_s: float
    prompt_tokens: int
    cached_tokens: int
    text: str


def text_of(random: Random, words: int) -> str:
    return " ".join(random.choice(_WORDS) for _ in range(words))


def send(client: httpx.Client, random: Random, system: str, messages: list[dict[str, Any]]) -> Turn:
    header = f"x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch={random.randrange(1 << 20):05x};\n"
    body = {
        "model": "agent",
        "max_tokens": _ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "system": [{"type": "text", "text": header + system, "cache_control": {"type": "ephemeral"}}],
        "tools": _TOOLS,
        "messages": messages,
    }
    begun, first_s, text = time.perf_counter(), 0.0, ""
    usage: dict[str, int] = {}
    with client.stream("POST", "/v1/messages", json=body) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"{reply.status_code}: {reply.read().decode()}")
        for line in reply.iter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if event.get("type") == "error":
                raise SystemExit(event["error"]["message"])
            if event.get("type") == "message_start":  # comes with the first token
                first_s = time.perf_counter() - begun
            if event.get("type") == "content_block_delta":
                text += event["delta"].get("text", "")
            usage = event.get("usage", usage)
    cached = usage["cache_read_input_tokens"]
    return Turn(first_s, usage["input_tokens"] + cached, cached, text)


def session(api: str, tokens: int, turns: int) -> list[Turn]:
    random = Random(_SEED)
    system = text_of(random, tokens)
    messages: list[dict[str, Any]] = [{"role": "user", "content": text_of(random, 40)}]
    done: list[Turn] = []
    with httpx.Client(base_url=api, trust_env=False, timeout=_DEADLINE_S) as client:
        for number in range(turns):
            turn = send(client, random, system, messages)
            done.append(turn)
            cached = turn.cached_tokens / turn.prompt_tokens
            print(f"turn {number + 1:3}: {turn.prompt_tokens:6} tokens, {cached:4.0%} cached, {turn.first_s:7.3f} s")
            name = f"call_{number}"
            call = {"type": "tool_use", "id": name, "name": "read_file", "input": {"path": "a"}}
            messages += [
                {"role": "assistant", "content": [{"type": "text", "text": turn.text}, call]},
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": name, "content": text_of(random, random.randint(5, 80))}
                    ],
                },
            ]
    return done


async def measure(options: argparse.Namespace) -> list[Turn]:
    layout = Layout(workers=options.workers, keys={"context_length": options.context})
    async with running(options.model, layout) as (bench, _):
        return await asyncio.to_thread(session, bench.api, options.tokens, options.turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000, help="words of the system prompt, about a token each")
    parser.add_argument("--context", type=int, default=32_768, help="tokens of a sequence, at most the model's")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    first, *others = asyncio.run(measure(parser.parse_args()))
    followed_s = median(turn.first_s for turn in others)
    print(f"first {first.first_s:.3f} s, others {followed_s:.3f} s in the median: {followed_s / first.first_s:.3f}")


if __name__ == "__main__":
    main()
