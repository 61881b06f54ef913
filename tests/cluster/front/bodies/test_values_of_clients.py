"""Tests of values that clients send although they mean nothing, and of blocks and versions that this server lacks."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import Any

import h11
import pytest

from llamaclust.cluster.front.body import HEADER
from llamaclust.cluster.front.dialects.embeddings import OpenAiEmbeddingBody
from llamaclust.cluster.front.dialects.ollama.schema import EmbedBody
from llamaclust.cluster.front.http.connections import HttpConnection
from llamaclust.cluster.front.images.parts import checked_base64
from llamaclust.cluster.front.schema import Body, read_fields
from support.clusters.served import MODEL, ScriptedEngine, client, make_app, says, serving, tokenizer
from support.clusters.tool_chats import served

HI = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": HI, "stream": False, "max_tokens": 9}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"stop": ""}),
        ("/v1/chat/completions", {"stop": ["", ""]}),
        ("/v1/messages", {"stop_sequences": [""]}),
        ("/v1/completions", {"prompt": "Hi", "messages": None, "stop": [""]}),
        ("/v1/responses", {"input": "Hi", "messages": None, "max_tokens": None, "stop": ""}),
        ("/api/chat", {"options": {"stop": [""]}, "max_tokens": None}),
        ("/completion", {"prompt": "Hi", "messages": None, "stop": ""}),
    ],
)
async def test_empty_stop_strings_are_none(path: str, fields: dict[str, Any]) -> None:
    async with served(ScriptedEngine(says("Yes."))) as http:
        reply = await http.post(path, json=CHAT | fields)
    assert reply.status_code == 200 and "Yes." in reply.text, reply.text


async def test_an_empty_stop_string_beside_another_is_left_out() -> None:
    async with served(ScriptedEngine(says("Yes. No."))) as http:
        reply = await http.post("/v1/chat/completions", json=CHAT | {"stop": ["", "."]})
    assert reply.json()["choices"][0]["message"]["content"] == "Yes"


@pytest.mark.parametrize("kind", [OpenAiEmbeddingBody, EmbedBody])
@pytest.mark.parametrize(("given", "read"), [(0, None), (None, None), (5, 5)])
def test_no_dimensions_are_all(kind: type[Body], given: int | None, read: int | None) -> None:
    body: Any = read_fields(kind, {"model": MODEL, "input": "Hi", "dimensions": given})
    assert body.dimensions == read


async def test_an_empty_text_has_no_embedding() -> None:
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        reply = await http.post("/api/embed", json={"model": MODEL, "input": ""})
    assert reply.status_code == 200 and reply.json()["embeddings"] == []


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}),
        ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": None}}}),
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "a"}}, "input": "Hi", "messages": None}),
    ],
)
async def test_a_schema_that_is_absent_is_any_object(path: str, fields: dict[str, Any]) -> None:
    engine = ScriptedEngine(says("{}"))
    async with served(engine) as http:
        reply = await http.post(path, json=CHAT | {"max_tokens": 90 if "v1/chat" in path else None} | fields)
    assert reply.status_code == 200, reply.text
    grammar = engine.submitted[0].grammar
    assert grammar is not None and '"object"' in grammar.definition


BLOCKS: list[tuple[Any, str, str | None]] = [
    ({"type": "compaction", "content": "So far."}, "So far.", None),
    ({"type": "compaction", "content": None, "encrypted_content": "x"}, "", None),
    ({"type": "browser_state", "state": {"tabs": []}}, "", "content.browser_state"),
    ({"type": "holograms", "points": [1]}, "", "content.holograms"),
    ({"type": "note", "text": "Read me."}, "Read me.", None),
]


@pytest.mark.parametrize(("block", "shown", "ignored"), BLOCKS)
@pytest.mark.parametrize("place", ["user", "assistant", "result"])
async def test_unknown_blocks_are_left_out_and_named(block: Any, shown: str, ignored: str | None, place: str) -> None:
    text, call = {"type": "text", "text": "A"}, {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [text, block] if place == "result" else "R"}
    messages = [
        {"role": "user", "content": [text, block] if place == "user" else "Q"},
        {"role": "assistant", "content": [text, block, call] if place == "assistant" else [text, call]},
        {"role": "user", "content": [result]},
    ]
    engine = ScriptedEngine(says("Yes."))
    async with served(engine) as http:
        reply = await http.post("/v1/messages", json=CHAT | {"messages": messages})
        strict = await http.post(
            "/v1/messages", json=CHAT | {"messages": messages}, headers={"X-Llamaclust-Strict": "1"}
        )
    assert reply.status_code == 200, reply.text
    assert reply.headers.get(HEADER) == ignored
    assert strict.status_code == (200 if ignored is None else 400)
    assert f"A\n{shown}" if shown else "A" in tokenizer().decode(engine.submitted[0].prompt)


@pytest.mark.parametrize("data", [b"a", b"ab", b"abc", b"abcd", bytes(range(256))])
def test_base64_may_lack_its_padding(data: bytes) -> None:
    text = b64encode(data).decode()
    assert checked_base64(text) == checked_base64(text.rstrip("=")) == text


@pytest.mark.parametrize("version", [b"2.0", b"3.0", b"0.9", b"9.9"])
async def test_other_versions_of_http_are_refused(version: bytes) -> None:
    async with serving(make_app(ScriptedEngine(says("a")))) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET /health HTTP/" + version + b"\r\nHost: a\r\n\r\n")
        reply = await asyncio.wait_for(reader.read(), 20.0)
        writer.close()
    assert reply.startswith(b"HTTP/1.1 505 HTTP Version Not Supported") and b"http_version_not_supported" in reply


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_versions_of_http_that_are_taken(version: bytes) -> None:
    connection = HttpConnection(h11.SERVER, 1 << 16)
    connection.begin_turn()
    connection.receive_data(b"GET / HTTP/" + version + b"\r\nHost: a\r\n\r\n")
    assert getattr(connection.next_event(), "http_version", None) == version
