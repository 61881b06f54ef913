"""Checks that events which render only their piece of text have the bytes of wholly rendered events, on every path to
the connection."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from llamaclust.cluster.front.dialects.openai.view import OpenAiView
from llamaclust.cluster.front.json_text import to_json
from support.clusters.served import ScriptedEngine, client, events_of, make_app, says, serving

TEXT = 'a "text":"b" "content":"" [] {} \\ \n \u2028 é 漢'
PATHS = ("/v1/completions", "/v1/chat/completions")
FIELDS: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"logprobs": True},
    {"return_token_ids": True},
    {"stop": ["zz"]},
]


def body_of(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "Hello"}]} if "chat" in path else {"prompt": "Hello"}
    if "logprobs" in fields and "chat" not in path:
        fields = {"logprobs": 1}
    return {"max_tokens": 100, "seed": 3, "stream": True, **prompt, **fields}


def test_no_client_takes_a_character_of_a_text_for_the_end_of_a_line() -> None:
    """Checks the characters at which `str.splitlines` and the `iter_lines` of httpx and requests divide lines."""
    dividing = [each for each in map(chr, range(0x110000)) if len(f"a{each}b".splitlines()) > 1]
    assert len(dividing) == 10
    data = to_json({"text": "".join(dividing)}).decode()
    assert len(data.splitlines()) == 1 and json.loads(data) == {"text": "".join(dividing)}


def without_names(data: bytes) -> bytes:
    """Replaces the fields that differ between replies to the same request."""
    return re.sub(rb'"(id|created)":("[^"]*"|\d+)', b'"\\1":0', data)


async def streamed(path: str, fields: dict[str, Any]) -> bytes:
    async with client(make_app(ScriptedEngine(says(TEXT)))) as http:
        return without_names((await http.post(path, json=body_of(path, fields))).content)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("path", PATHS)
async def test_events_are_those_that_are_rendered_in_whole(
    path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await streamed(path, fields)
    monkeypatch.setattr(OpenAiView, "_text", lambda *_: None)
    assert found == await streamed(path, fields)
    parts = [event["choices"][0] for event in events_of(found.decode())[:-1] if event["choices"]]
    texts = [part.get("text") or part.get("delta", {}).get("content") or "" for part in parts if part["index"] == 0]
    assert "".join(texts) == TEXT
    for line in found.splitlines():
        if line.startswith(b"data: {"):
            assert b"data: " + to_json(events_of(line.decode())[0]) == line


async def written(url: str, path: str, fields: dict[str, Any], version: bytes) -> bytes:
    """Returns the bytes of a reply's head and body."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = to_json(body_of(path, fields))
    head = b"POST %b HTTP/%b\r\nHost: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    writer.write(head % (path.encode(), version, host.encode(), len(body)) + body)
    try:
        async with asyncio.timeout(60):
            return await reader.read()
    finally:
        writer.close()


def joined(chunked: bytes) -> bytes:
    """Joins the chunks of a body, which must be complete."""
    body = b""
    while True:
        size, _, chunked = chunked.partition(b"\r\n")
        count = int(size, 16)
        body, chunked = body + chunked[:count], chunked[count:].removeprefix(b"\r\n")
        if not count:
            assert not chunked
            return body


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("path", PATHS)
async def test_connections_carry_the_same_bytes(path: str, version: bytes) -> None:
    """Tests both HTTP versions; chunks of HTTP/1.1 bypass the layers between endpoint and server."""
    async with serving(make_app(ScriptedEngine(says(TEXT)))) as url:
        head, _, body = (await written(url, path, {}, version)).partition(b"\r\n\r\n")
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    assert is_chunked == (version == b"1.1")
    assert without_names(joined(body) if is_chunked else body) == await streamed(path, {})
