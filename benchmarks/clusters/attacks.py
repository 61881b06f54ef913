"""What a hostile client costs others: gaps in their streams, `/live`, first tokens, memory; and how it is answered.

    python benchmarks/clusters/attacks.py MODEL.gguf [--attack choices tokenize ...] [--at-once 8] [--streams 4]

Two API keys: the attacker's requests come with one, streams and short requests of others with the other. Bodies are of
15 MB with as many elements as fit, `--at-once` of each together. `background`: 300 background responses; `tokenize`: 40
texts of 1 MiB; `answers`: 128 answers that obey a large schema; `logprobs`: a reply of 32 answers of 1,900 tokens with
20 logprobs each (of a tiny model, which is fast enough); `ambiguous`: 16 answers under grammars whose matchers take 20
to 60 ms a token; `fixed_texts`: 8 choices of one text of 100,000 characters each. Without a key: `headers`, 900
connections with 10,000 short headers each; `chunks`, 40 bodies in 100,000 chunks of one byte.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final

import httpx
from gaps import Others, others
from running import Bench, Layout, resident_mib, running

from llamaclust.cluster.client.http import AsyncClient

_OWN, _OTHER = "key-of-others", "key-of-attacker"
_SIZE = 15_000_000
_QUIET_S = 5.0
_SETTLE_S = 2.0
_PROBE_S = 0.1
_DEADLINE_S = 300.0
_NUMBER = "@NUMBER@"
"""A place in bodies that takes the number of the request."""
_POST = """
import asyncio, sys, httpx
path, key, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
body = sys.stdin.buffer.read()
async def post(client, number):
    try:
        reply = await client.post(path, content=body.replace(sys.argv[4].encode(), b"%d" % number))
        print(reply.status_code, " ".join(reply.text.split())[:150].encode("ascii", "replace").decode(), flush=True)
    except httpx.HTTPError as error:
        print(0, type(error).__name__, flush=True)
async def main():
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=headers, timeout=200.0, limits=limits, trust_env=False) as client:
        await asyncio.gather(*(post(client, number) for number in range(count)))
asyncio.run(main())
"""
"""A client of its own process, which does not hold up the others."""

_RAW = """
import socket, sys
(host, _, port), count = sys.argv[1].partition(":"), int(sys.argv[2])
data = sys.stdin.buffer.read()
connections = [socket.create_connection((host, int(port)), 200) for _ in range(count)]
for connection in connections:
    try:
        connection.sendall(data)
    except OSError:
        pass
for connection in connections:
    try:
        print(connection.recv(1000).partition(b" ")[2][:3].decode() or 0, flush=True)
    except OSError as error:
        print(0, type(error).__name__, flush=True)
"""
"""A client that sends bytes as they are."""

Body = tuple[str, bytes]
"""Path and JSON; or no path and bytes that are no request of an HTTP client."""


def _filled(before: str, item: str, after: str, size: int = _SIZE) -> bytes:
    """As many items as fit, with commas."""
    count = (size - len(before) - len(after)) // (len(item) + 1)
    return (before + ",".join([item] * count) + after).encode()


def _tool() -> str:
    fields = ",".join(f'"field_{number}":{{"type":"string"}}' for number in range(30))
    return '{"type":"function","function":{"name":"a","parameters":{"type":"object","properties":{' + fields + "}}}}"


def _members(before: str, value: str, after: str, size: int = _SIZE) -> bytes:
    """An object of as many members as fit, of different names."""
    count = (size - len(before) - len(after)) // (len(value) + 12)
    return (before + ",".join(f'"{number:08}":{value}' for number in range(count)) + after).encode()


_CHAT = '{"messages":[{"role":"user","content":"a"}],"max_tokens":1,'
_ASKED = '{"prompt":"a","max_tokens":1,'
_TEXTS: Final = '"a"'
_MOST_VALUES, _MOST_FIELD_VALUES = 1_100_000, 32_000
"""The bodies named `..._most` are as large as is taken."""
BODIES: Final[dict[str, Callable[[], Body]]] = {
    "choices": lambda: ("v1/completions", _filled(_ASKED + '"guided_choice":[', _TEXTS, "]}")),
    "schema": lambda: ("v1/completions", _members(_ASKED + '"json_schema":{"properties":{', "{}", "}}}")),
    "response_format": lambda: (
        "v1/chat/completions",
        _members(
            _CHAT + '"response_format":{"type":"json_schema","json_schema":{"schema":{"properties":{', "{}", "}}}}}"
        ),
    ),
    "schema_text": lambda: ("v1/completions", _filled(_ASKED + '"guided_json":"[', "1", ']"}')),
    "tools": lambda: (
        "v1/chat/completions",
        _filled(_CHAT + '"tools":[', '{"type":"function","function":{"name":"a","parameters":{}}}', "]}"),
    ),
    "tool": lambda: (
        "v1/messages",
        _members(
            '{"model":"bench","max_tokens":1,"messages":[{"role":"user","content":"a"}],'
            '"tools":[{"name":"a","input_schema":{"type":"object","properties":{',
            "{}",
            "}}}]}",
        ),
    ),
    "messages": lambda: ("v1/chat/completions", _filled('{"messages":[', '{"role":"user","content":"a"}', "]}")),
    "parts": lambda: (
        "v1/messages",
        _filled(
            '{"model":"bench","max_tokens":1,"messages":[{"role":"user","content":[',
            '{"type":"text","text":"a"}',
            "]}]}",
        ),
    ),
    "items": lambda: ("v1/responses", _filled('{"input":[', '{"role":"user","content":"a"}', "]}")),
    "bias": lambda: ("v1/completions", _members(_ASKED + '"logit_bias":{', "1", "}}")),
    "pairs": lambda: ("completion", _filled('{"prompt":"a","n_predict":1,"logit_bias":[', "[1,1]", "]}")),
    "stop": lambda: ("api/generate", _filled('{"model":"bench","prompt":"a","options":{"stop":[', _TEXTS, "]}}")),
    "format": lambda: (
        "api/chat",
        _members('{"model":"bench","messages":[{"role":"user","content":"a"}],"format":{"properties":{', "{}", "}}}"),
    ),
    "ids": lambda: ("v1/completions", _filled('{"max_tokens":1,"prompt":[', "1", "]}")),
    "mixed": lambda: ("completion", _filled('{"n_predict":1,"prompt":[', '1,"a"', "]}")),
    "inputs": lambda: ("v1/embeddings", _filled('{"input":[', "[1]", "]}")),
    "documents": lambda: ("v1/rerank", _filled('{"query":"a","documents":[', _TEXTS, "]}")),
    "detokenize": lambda: ("detokenize", _filled('{"tokens":[', "1", "]}")),
    "metadata": lambda: ("v1/responses", _members('{"input":"a","metadata":{', '""', "}}")),
    "unknown": lambda: ("v1/chat/completions", _filled(_CHAT + '"unknown":[', "[]", "]}")),
    "deep": lambda: (
        "v1/chat/completions",
        (_CHAT + '"unknown":' + "[" * (_SIZE // 2) + "]" * (_SIZE // 2) + "}").encode(),
    ),
    "fields": lambda: ("v1/chat/completions", _members(_CHAT, "1", "}")),
    "ids_most": lambda: ("v1/completions", _filled('{"max_tokens":1,"prompt":[', "12345", "]}", 6 * _MOST_VALUES)),
    "parts_most": lambda: (
        "v1/chat/completions",
        _filled('{"messages":[{"role":"user","content":[', '{"type":"text","text":"a"}', "]}]}", 9 * _MOST_VALUES),
    ),
    "messages_most": lambda: (
        "v1/chat/completions",
        _filled('{"messages":[', '{"role":"user","content":"a"}', "]}", 30 * 99_000),
    ),
    "tools_most": lambda: (
        "v1/chat/completions",
        _filled(_CHAT + '"tools":[', _tool(), "]}", 1000 * (len(_tool()) + 1)),
    ),
    "schema_most": lambda: (
        "v1/completions",
        _members(_ASKED + '"json_schema":{"properties":{', "{}", "}}}", 14 * _MOST_FIELD_VALUES // 2),
    ),
    "choices_most": lambda: (
        "v1/completions",
        _filled(_ASKED + '"guided_choice":[', '"an answer of many"', "]}", 20 * _MOST_FIELD_VALUES),
    ),
    "text": lambda: ("v1/completions", ('{"max_tokens":1,"prompt":"' + "a b, " * (_SIZE // 5) + '"}').encode()),
}


def _tokenized() -> Body:
    return "tokenize", json.dumps({"content": "Il était une fois, " * 52_000}).encode()


def _background() -> Body:
    body = {"input": "a long story", "background": True, "max_output_tokens": 500, "ignore_eos": True}
    return "v1/responses", json.dumps(body).encode()


def _answers() -> Body:
    fields = {
        f"field_{number}": {"type": "string", "pattern": f"^[a-z]{{2,{number % 30 + 3}}}$"} for number in range(300)
    }
    schema = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    body = {"prompt": "a", "max_tokens": 64, "n": 128, "json_schema": schema}
    return "v1/completions", json.dumps(body).encode()


def _logprobs() -> Body:
    asked = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1900, "n": 32, "ignore_eos": True}
    return "v1/chat/completions", json.dumps({**asked, "logprobs": True, "top_logprobs": 20}).encode()


def _ambiguous() -> Body:
    grammar = 'start: s\ns: s s s | s s | "a" | "ab"'
    body = {"prompt": "a", "n_predict": 170, "grammar": grammar, "ignore_eos": True, "logit_bias": [["a", 50]]}
    return "completion", json.dumps(body).encode()


def _fixed_texts() -> Body:
    body = {"prompt": "a", "max_tokens": 4, "guided_choice": ["z" * 100_000 + _NUMBER]}
    return "v1/completions", json.dumps(body).encode()


def _headers() -> Body:
    return "", b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n" + 10_000 * b"a: b\r\n" + b"\r\n"


def _chunks() -> Body:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    return "", head + 100_000 * b"1\r\na\r\n" + b"0\r\n\r\n"


FLOODS: Final[Mapping[str, tuple[Callable[[], Body], int]]] = {
    "tokenize": (_tokenized, 40),
    "background": (_background, 300),
    "answers": (_answers, 1),
    "logprobs": (_logprobs, 1),
    "ambiguous": (_ambiguous, 16),
    "fixed_texts": (_fixed_texts, 8),
    "headers": (_headers, 900),
    "chunks": (_chunks, 40),
}
"""Bodies, and how many come at once."""


class Live:
    """The seconds that `/live` takes."""

    def __init__(self, api: str) -> None:
        self._api = api
        self.longest_s = 0.0

    async def probe(self) -> None:
        async with httpx.AsyncClient(base_url=self._api, timeout=_DEADLINE_S, trust_env=False) as client:
            while True:
                begun_s = time.monotonic()
                await client.get("/live")
                self.longest_s = max(self.longest_s, time.monotonic() - begun_s)
                await asyncio.sleep(_PROBE_S)


async def post(api: str, body: Body, count: int) -> str:
    """How `count` of them were answered."""
    pipe = asyncio.subprocess.PIPE
    sent = (_POST, f"{api}/{body[0]}", _OTHER, str(count), _NUMBER) if body[0] else (_RAW, api[7:], str(count))
    words = (sys.executable, "-c", *sent)
    process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe)
    begun_s = time.monotonic()
    out, _ = await process.communicate(body[1])
    lines = out.decode().splitlines()
    counts = Counter(line.partition(" ")[0] for line in lines)
    shown = ", ".join(f"{number} x {status}" for status, number in counts.items())
    refused = next((line for line in lines if not line.startswith("200")), "")
    return f"{shown} in {time.monotonic() - begun_s:.1f} s {refused[:110]}"


async def bound_s(api: str) -> float:
    """How long another key's answer takes that has a form, when the attack has run for a moment."""
    await asyncio.sleep(_SETTLE_S)
    begun_s = time.monotonic()
    body = {"prompt": "a", "max_tokens": 2, "json_schema": {"enum": [f"yes {begun_s}", "no"]}}
    headers = {"Authorization": f"Bearer {_OWN}"}
    async with httpx.AsyncClient(base_url=api, headers=headers, timeout=_DEADLINE_S, trust_env=False) as client:
        (await client.post("/v1/completions", json=body)).raise_for_status()
    return time.monotonic() - begun_s


@contextmanager
def _keys() -> Iterator[Path]:
    with NamedTemporaryFile("w", prefix="llamaclust-keys-") as file:
        file.write(f"{_OWN}\n{_OTHER}\n")
        file.flush()
        yield Path(file.name)


async def measure(bench: Bench, seen: Others, live: Live, name: str, most: int, pid: int) -> str:
    make, count = FLOODS[name] if name in FLOODS else (BODIES[name], most)
    body = await asyncio.to_thread(make)
    await asyncio.sleep(_SETTLE_S)
    idle_mib = resident_mib(pid)
    seen.clear()
    live.longest_s = 0.0
    form_s, answer = await asyncio.gather(
        bound_s(bench.api), asyncio.wait_for(post(bench.api, body, count), _DEADLINE_S)
    )
    await asyncio.sleep(_SETTLE_S)
    first_s = max(seen.first_s, default=math.inf)  # none came
    figures = (1e3 * seen.longest_s, 1e3 * live.longest_s, 1e3 * first_s, 1e3 * form_s, seen.most_mib - idle_mib)
    return f"{name:16}" + "".join(f"{figure:9.0f}" for figure in figures) + f"   {answer}"


async def run(model: Path, attacks: list[str], at_once: int, streams: int) -> None:
    with _keys() as keys_file:
        keys: dict[str, Any] = {"context_length": 2048, "objective": "throughput", "api_keys_file": str(keys_file)}
        async with (
            running(model, Layout(workers=2, keys=keys)) as (bench, coordinator),
            AsyncClient(bench.api, _OWN) as client,
            others(client, streams, coordinator.pid) as seen,
            asyncio.TaskGroup() as group,
        ):
            live = Live(bench.api)
            probing = group.create_task(live.probe())
            print(
                f"{'':16}{'gap ms':>9}{'live ms':>9}{'first ms':>9}{'form ms':>9}{'MiB more':>9}   answers", flush=True
            )
            await asyncio.sleep(_QUIET_S)
            for name in attacks:
                print(await measure(bench, seen, live, name, at_once, coordinator.pid), flush=True)
            probing.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*BODIES, *FLOODS]
    parser.add_argument("model", type=Path)
    parser.add_argument("--attack", nargs="+", choices=known, default=known)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--streams", type=int, default=4)
    given = parser.parse_args()
    asyncio.run(run(given.model, given.attack, given.at_once, given.streams))


if __name__ == "__main__":
    main()
