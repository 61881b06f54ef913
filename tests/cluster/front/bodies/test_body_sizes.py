"""Checks that bodies with too many values are refused unparsed and that large bodies are parsed one at a time."""

from __future__ import annotations

import asyncio
import json
import threading
from asyncio import TaskGroup
from random import Random
from typing import Any

import pytest

from llamaclust.cluster.front import body as bodies
from llamaclust.cluster.front import json_text
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.json_text import MAX_FIELD_VALUES, outline
from llamaclust.cluster.front.structured_output import GrammarFields
from llamaclust.cluster.front.text.sharing import current_owner
from llamaclust.core.errors import ParameterError
from llamaclust.core.sampler.matchers import Grammar
from llamaclust.model.grammars import definitions
from support.clusters.served import MODEL, ScriptedEngine, client, make_app, says
from support.seed import SEED

_CHARACTERS = 'a"\\,[]{}:é\n'
_MANY = MAX_FIELD_VALUES + 1
_CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
_PADDING = " " * bodies.LARGE_BYTES


def _values(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_values, inner))


def _drawn(source: Random, depth: int) -> Any:
    match source.randrange(6 if depth else 4):
        case 4:
            return [_drawn(source, depth - 1) for _ in range(source.randrange(5))]
        case 5:
            return {_text(source): _drawn(source, depth - 1) for _ in range(source.randrange(5))}
        case kind:
            return (None, 1.5, True, _text(source))[kind]


def _text(source: Random) -> str:
    return "".join(source.choices(_CHARACTERS, k=source.randrange(9)))


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 1 << 18])
def test_an_outline_has_every_member_and_its_values(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks random texts with quotes, backslashes and brackets at all block boundaries."""
    print(f"seed {SEED}")
    monkeypatch.setattr(json_text, "_BLOCK_BYTES", block_bytes)
    source = Random(SEED)
    for _ in range(200):
        value = {_text(source): _drawn(source, 4) for _ in range(1 + source.randrange(6))}
        text = json.dumps(value, ensure_ascii=source.random() < 0.5, indent=source.choice([None, 1]))
        made = outline(text.encode())
        assert _values(value) <= made.values <= 2 * _values(value) + 1
        assert [member.name for member in made.members] == list(value)
        assert made.member_count == len(value)
        for member, inner in zip(made.members, value.values(), strict=True):
            assert _values(inner) - 1 <= member.values <= 2 * _values(inner) + 1
            assert member.is_null is (inner is None)


@pytest.mark.parametrize("data", [b"", b"[", b'{"a', b'{"a":1', b"\\\\", b"}}},{", b'"', b"[1,2]", b"\xff" * 9])
def test_an_outline_of_what_is_no_object_is_an_outline(data: bytes) -> None:
    assert outline(data).values <= len(data) + 1


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {**_CHAT, "chat_template_kwargs": {"a": [0] * _MANY}}, "chat_template_kwargs"),
        ("/v1/chat/completions", {**_CHAT, "stop_token_ids": [1] * _MANY}, "stop_token_ids"),
        ("/v1/chat/completions", {**_CHAT, "metadata": {str(key): "" for key in range(_MANY)}}, "metadata"),
        ("/v1/completions", {"prompt": "a", "dry_sequence_breakers": ["a"] * _MANY}, "dry_sequence_breakers"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"choice": ["a"] * _MANY}}, "structured_outputs"),
        ("/v1/completions", {"prompt": "a", "grammar": "a" * (1 << 22)}, "grammar"),
        ("/v1/messages", {**_CHAT, "stop_sequences": ["a"] * _MANY}, None),
        ("/v1/messages", {**_CHAT, "tools": [{"name": "a"}] * (1 << 17)}, None),
        ("/v1/responses", {"input": "a", "text": {"format": {"schema": {"enum": ["a"] * _MANY}}}}, "text"),
        ("/completion", {"prompt": "a", "samplers": ["top_k"] * _MANY}, "samplers"),
        ("/v1/embeddings", {"input": "a", "user": [0] * _MANY}, "user"),
        ("/api/chat", {**_CHAT, "options": {"stop": ["a"] * _MANY}}, None),
        ("/tokenize", {"content": "a", "unknown": [{}] * _MANY}, "unknown"),
    ],
)
async def test_fields_with_too_many_values_are_refused_unread(
    path: str, fields: dict[str, Any], param: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "from_json", _never)
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        reply = await http.post(path, json=fields)
    assert reply.status_code == 400
    assert "the limit is" in reply.text and "JSON" in reply.text
    assert param is None or reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1] * (1 << 21)},
        {"messages": [{}] * (1 << 20)},
        {"documents": [[]] * (1 << 20)},
        {str(number): 1 for number in range(10_000)},
    ],
)
def test_bodies_with_too_many_values_are_refused_unread(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "from_json", _never)
    with pytest.raises(HttpError, match=r"the body has \d+ (values|fields); the limit is \d+") as refusal:
        bodies.parse_object(json.dumps(fields).encode())
    assert refusal.value.http_status == 413


def _never(*_: object) -> None:
    raise AssertionError("values were made")


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": "[" * (MAX_FIELD_VALUES + 8)},
        {"json_schema": json.dumps({"enum": [0] * _MANY})},
        {"structured_outputs": {"json": " " * (1 << 21)}},
    ],
)
def test_schemas_in_texts_are_counted_before_they_are_read(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaclust.cluster.front.structured_output.json.loads", _never)
    with pytest.raises(ParameterError, match=r"\d+ (JSON values|characters); the limit is \d+"):
        GrammarFields(**fields).answer_grammar()


async def test_large_bodies_are_read_one_at_a_time_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that an owner's large bodies delay only its own and that small bodies are parsed at once."""
    order, reading = list[str](), list[bytes]()
    parse = bodies.parse_json

    def noted(data: bytes) -> Any:
        reading.append(data)
        assert len(reading) == 1, "two at once"
        order.append(data[:1].decode())
        return parse(reading.pop()[1:])

    monkeypatch.setattr(bodies, "parse_json", noted)

    async def read(owner: str, padding: str = _PADDING) -> None:
        current_owner.set(owner)
        await bodies.parse_object_in_time(f"{owner}{padding}{{}}".encode())

    async with TaskGroup() as group:
        for owner in "aaaaaabbc":
            group.create_task(read(owner))
        await asyncio.sleep(0)
        await read("d", "")
        assert order.count("d") == 1
    order.remove("d")
    assert order[:2] == ["a", "b"] and "c" in order[:4] and order[:6].count("b") == 2


_LARGE: dict[str, Any] = {"properties": {str(number): {} for number in range(2000)}}
_CHOICES = [f"{number}" for number in range(2000)]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {**_CHAT, "response_format": {"type": "json_object", "schema": _LARGE}}),
        ("/v1/completions", {"prompt": "a", "guided_choice": _CHOICES}),
        ("/v1/messages", {**_CHAT, "output_config": {"format": {"type": "json_schema", "schema": _LARGE}}}),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema", "name": "a", "schema": _LARGE}}}),
        ("/completion", {"prompt": "a", "json_schema": _LARGE}),
        ("/api/generate", {"model": MODEL, "prompt": "a", "raw": True, "format": _LARGE}),
        ("/api/chat", {**_CHAT, "format": _LARGE, "options": {}}),
    ],
)
async def test_large_fields_become_grammars_off_the_event_loop(
    path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks that all dialects make large grammars on other threads and small ones on the event loop."""
    made_on, loop = set[int](), threading.get_ident()

    def noted(*given: Any, **named: Any) -> Grammar:
        made_on.add(threading.get_ident())
        return Grammar(*given, **named)

    monkeypatch.setattr(definitions, "Grammar", noted)
    async with client(make_app(ScriptedEngine(says("a")))) as http:
        await http.post(path, json=fields)
        assert made_on and loop not in made_on
        made_on.clear()
        text = (
            json.dumps(fields).replace(json.dumps(_LARGE), '{"type": "object"}').replace(json.dumps(_CHOICES), '["a"]')
        )
        await http.post(path, content=text)
        assert made_on == {loop}
