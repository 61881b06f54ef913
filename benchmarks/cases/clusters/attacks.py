from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

import httpx
from runner.beside import Others, others, posted
from runner.case import Case, Group, Measures, argument, option
from runner.clusters import Bench, Layout, running
from runner.options import chosen, existing, listed, positive

from llamaclust.cluster.client.http import AsyncClient

_OWN, _OTHER = "key-of-others", "key-of-attacker"
_SIZE = 15_000_000
_SETTLE_S = 2.0
_DEADLINE_S = 300.0
_CHAT, _ASKED = '{"messages":[{"role":"user","content":"a"}],"max_tokens":1,', '{"prompt":"a","max_tokens":1,'
_MESSAGE, _PART = '{"role":"user","content":"a"}', '{"type":"text","text":"a"}'
_FIELDS = ",".join(f'"field_{number}":{{"type":"string"}}' for number in range(30))
_TOOL = '{"type":"function","function":{"name":"a","parameters":{"type":"object","properties":{' + _FIELDS + "}}}}"
_FORMAT = '"response_format":{"type":"json_schema","json_schema":{"schema":{"properties":{'
_COMPLETIONS, _CHATS, _RESPONSES = "v1/completions", "v1/chat/completions", "v1/responses"
BODIES: Final[Mapping[str, tuple[str, str, str, str, int]]] = {
    name: (path, before, item, after, size or _SIZE)
    for name, path, before, item, after, size in (
        ("choices", _COMPLETIONS, _ASKED + '"guided_choice":[', '"a"', "]}", 0),
        ("schema", _COMPLETIONS, _ASKED + '"json_schema":{"properties":{', ":{}", "}}}", 0),
        ("response_format", _CHATS, _CHAT + _FORMAT, ":{}", "}}}}}", 0),
        ("schema_text", _COMPLETIONS, _ASKED + '"guided_json":"[', "1", ']"}', 0),
        ("tools", _CHATS, _CHAT + '"tools":[', '{"type":"function","function":{"name":"a","parameters":{}}}', "]}", 0),
        (
            "tool",
            "v1/messages",
            f'{{"model":"bench","max_tokens":1,"messages":[{_MESSAGE}],'
            '"tools":[{"name":"a","input_schema":{"type":"object","properties":{',
            ":{}",
            "}}}]}",
            0,
        ),
        ("messages", _CHATS, '{"messages":[', _MESSAGE, "]}", 0),
        (
            "parts",
            "v1/messages",
            '{"model":"bench","max_tokens":1,"messages":[{"role":"user","content":[',
            _PART,
            "]}]}",
            0,
        ),
        ("items", _RESPONSES, '{"input":[', _MESSAGE, "]}", 0),
        ("bias", _COMPLETIONS, _ASKED + '"logit_bias":{', ":1", "}}", 0),
        ("pairs", "completion", '{"prompt":"a","n_predict":1,"logit_bias":[', "[1,1]", "]}", 0),
        ("stop", "api/generate", '{"model":"bench","prompt":"a","options":{"stop":[', '"a"', "]}}", 0),
        (
            "format",
            "api/chat",
            f'{{"model":"bench","messages":[{_MESSAGE}],"format":{{"properties":{{',
            ":{}",
            "}}}",
            0,
        ),
        ("ids", _COMPLETIONS, '{"max_tokens":1,"prompt":[', "1", "]}", 0),
        ("mixed", "completion", '{"n_predict":1,"prompt":[', '1,"a"', "]}", 0),
        ("inputs", "v1/embeddings", '{"input":[', "[1]", "]}", 0),
        ("documents", "v1/rerank", '{"query":"a","documents":[', '"a"', "]}", 0),
        ("detokenize", "detokenize", '{"tokens":[', "1", "]}", 0),
        ("metadata", _RESPONSES, '{"input":"a","metadata":{', ':""', "}}", 0),
        ("unknown", _CHATS, _CHAT + '"unknown":[', "[]", "]}", 0),
        ("deep", _CHATS, _CHAT + '"unknown":' + "[" * (_SIZE // 2), "", "]" * (_SIZE // 2) + "}", 1),
        ("fields", _CHATS, _CHAT, ":1", "}", 0),
        ("ids_most", _COMPLETIONS, '{"max_tokens":1,"prompt":[', "12345", "]}", 6_600_000),
        ("parts_most", _CHATS, '{"messages":[{"role":"user","content":[', _PART, "]}]}", 9_900_000),
        ("messages_most", _CHATS, '{"messages":[', _MESSAGE, "]}", 2_970_000),
        ("tools_most", _CHATS, _CHAT + '"tools":[', _TOOL, "]}", 1000 * (len(_TOOL) + 1)),
        ("schema_most", _COMPLETIONS, _ASKED + '"json_schema":{"properties":{', ":{}", "}}}", 224_000),
        ("choices_most", _COMPLETIONS, _ASKED + '"guided_choice":[', '"an answer of many"', "]}", 640_000),
        ("text", _COMPLETIONS, '{"max_tokens":1,"prompt":"' + "a b, " * (_SIZE // 5), "", '"}', 1),
    )
}
"""Request bodies by name: path, beginning, item, end, size in bytes. The item is repeated to fill the size. An item
that begins with a colon is a JSON value and gets a new name each time. `..._most` bodies are as large as allowed."""


def filled(before: str, item: str, after: str, size: int) -> bytes:
    length = len(item) + (11 if item.startswith(":") else 1)
    count = max(0, size - len(before) - len(after)) // length
    items = (f'"{number:08}"{item}' for number in range(count)) if item.startswith(":") else [item] * count
    return (before + ",".join(items) + after).encode()


def _json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def _answers() -> bytes:
    fields = {f"field_{n}": {"type": "string", "pattern": f"^[a-z]{{2,{n % 30 + 3}}}$"} for n in range(300)}
    schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    return _json(prompt="a", max_tokens=64, n=128, json_schema=schema)


_LOGPROBS = {"max_tokens": 1900, "n": 32, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
_GRAMMAR = 'start: s\ns: s s s | s s | "a" | "ab"'
_AMBIGUOUS = {"n_predict": 170, "grammar": _GRAMMAR, "ignore_eos": True, "logit_bias": [["a", 50]]}
_HEAD = b"HTTP/1.1\r\nHost: 127.0.0.1\r\n"
_BEGUN = b"POST /v1/completions " + _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
_BACKGROUND = {"input": "a long story", "background": True, "max_output_tokens": 500, "ignore_eos": True}
FLOODS: Final[Mapping[str, tuple[str, Callable[[], bytes], int]]] = {
    "tokenize": ("tokenize", lambda: _json(content="Il était une fois, " * 52_000), 40),
    "background": (_RESPONSES, lambda: _json(**_BACKGROUND), 300),
    "answers": (_COMPLETIONS, _answers, 1),
    "logprobs": (_CHATS, lambda: _json(messages=[{"role": "user", "content": "a"}], **_LOGPROBS), 1),
    "ambiguous": ("completion", lambda: _json(prompt="a", **_AMBIGUOUS), 16),
    "fixed_texts": (
        _COMPLETIONS,
        lambda: _json(prompt="a", max_tokens=4, guided_choice=["z" * 100_000 + "@NUMBER@"]),
        8,
    ),
    "headers": ("", lambda: b"GET /live " + _HEAD + 10_000 * b"a: b\r\n" + b"\r\n", 900),
    "chunks": ("", lambda: _BEGUN + 100_000 * b"1\r\na\r\n" + b"0\r\n\r\n", 40),
}
"""More attacks by name: path, function that makes the body, and number of simultaneous requests. An empty path means
that the function makes a whole HTTP request."""
_KNOWN = (*BODIES, *FLOODS)


@dataclass(frozen=True)
class Attacks(Case):
    """Measures how a hostile client affects others: pauses in streams, times of `/live` and of first tokens, memory.
    The attacker and the other clients have different API keys. Most attacks send --at-once request bodies of 15 MB at
    the same time. `background` sends 300 background responses. `tokenize` sends 40 texts of 1 MiB. `answers` requests
    128 answers that obey a large schema. `logprobs` requests 32 answers of 1,900 tokens with 20 logprobs each (needs a
    tiny model). `ambiguous` requests 16 answers whose grammar takes 20 to 60 ms per token. `fixed_texts` sends 8
    choices of 100,000 characters. Two attacks need no key: `headers` (900 connections with 10,000 headers each) and
    `chunks` (40 bodies of 100,000 chunks each). `form ms` is the time of another client's answer under a schema."""

    rounds = 1
    model: Path = argument("path of a .gguf", existing)
    attack: tuple[str, ...] = option(
        _KNOWN, "names of the attacks to run", listed(chosen("attack", {name: name for name in _KNOWN}))
    )
    at_once: int = option(8, "number of request bodies that are sent at once", positive)
    streams: int = option(4, "number of streams of other clients", positive)

    async def groups(self) -> AsyncIterator[Group]:
        with NamedTemporaryFile("w", prefix="llamaclust-keys-") as file:
            file.write(f"{_OWN}\n{_OTHER}\n")
            file.flush()
            keys = {"context_length": 2048, "objective": "throughput", "api_keys_file": file.name}
            async with (
                running(self.model, Layout(workers=2, keys=keys)) as (bench, _),
                AsyncClient(bench.api, _OWN) as client,
                others(client, bench, self.streams) as seen,
            ):
                for name in self.attack:
                    yield Group("", {name: partial(self._measure, bench, seen, name)}, rounds=1)

    async def _measure(self, bench: Bench, seen: Others, name: str, turn: int) -> Measures:
        path, make, count = FLOODS[name] if name in FLOODS else (BODIES[name][0], None, self.at_once)
        body = make() if make is not None else await asyncio.to_thread(filled, *BODIES[name][1:])
        await asyncio.sleep(_SETTLE_S)
        seen.clear()
        work = asyncio.wait_for(posted(bench.api, path, body, count, _OTHER), _DEADLINE_S)
        form_s, answer = await asyncio.gather(_bound_s(bench.api), work)
        await asyncio.sleep(_SETTLE_S)
        return {**seen.measures, "form ms": 1e3 * form_s, "answers": answer}


async def _bound_s(api: str) -> float:
    await asyncio.sleep(_SETTLE_S)
    begun_s = time.monotonic()
    body = {"prompt": "a", "max_tokens": 2, "json_schema": {"enum": [f"yes {begun_s}", "no"]}}
    headers = {"Authorization": f"Bearer {_OWN}"}
    async with httpx.AsyncClient(base_url=api, headers=headers, timeout=_DEADLINE_S, trust_env=False) as client:
        (await client.post("/v1/completions", json=body)).raise_for_status()
    return time.monotonic() - begun_s
