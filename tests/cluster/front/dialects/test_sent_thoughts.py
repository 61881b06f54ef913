"""Tests of thoughts that clients send back: every API, every name, every form that templates read."""

from __future__ import annotations

from typing import Any

import pytest

from llamaclust.model.chat.template import ChatTemplate
from support.clusters.served import MODEL, ScriptedEngine, client, make_app, says, tokenizer

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
_CALLS = "{% if m.tool_calls %}+{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}{% endfor %}"
_SHOWN = "{% for m in messages %}<{{ m.role }}>BODY{{ m.content }}" + _CALLS
_NAMED = "{% if m.NAME %}<think>{{ m.NAME }}</think>{% endif %}"
_NAMES = ("reasoning_content", "reasoning", "thinking", "thought")
TEMPLATES = {name: _SHOWN.replace("BODY", _NAMED.replace("NAME", name)) for name in _NAMES} | {
    "parts": (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'thinking' %}<think>{{ p.thinking }}</think>{% else %}{{ p.text }}"
        "{% endif %}{% endfor %}{% endif %}" + _CALLS
    ),
    "one of both": _SHOWN.replace(
        "BODY",
        "{% if m.tool_calls and m.content and m.thinking %}{{ raise_exception('one of both') }}{% endif %}"
        + _NAMED.replace("NAME", "thinking"),
    ),
}
USER, RESULT = {"role": "user", "content": "Q"}, {"role": "tool", "tool_call_id": "c1", "content": "R"}


async def prompt_of(path: str, body: dict[str, Any], template: str) -> str:
    engine = ScriptedEngine(says("ok"))
    with ChatTemplate(template, "", "") as made:
        async with client(make_app(engine, made)) as http:
            reply = await http.post(path, json={"model": MODEL, "stream": False} | body)
    assert reply.status_code == 200 and "x-llamaclust-ignored" not in reply.headers, reply.text
    return tokenizer().decode(engine.submitted[0].prompt)


def _chat(message: dict[str, Any]) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL]} | message
    return {"messages": [USER, answer, RESULT]}


def _blocks(*blocks: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "tool_use", "id": "c1", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "R"}
    turns = [{"role": "assistant", "content": [*blocks, call]}, {"role": "user", "content": [result]}]
    return {"messages": [USER, *turns], "max_tokens": 9}


def _items(**reasoning: Any) -> dict[str, Any]:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c1", "output": "R"}
    return {"input": [USER, {"type": "reasoning", **reasoning}, call, result]}


_CHAT, _ANTHROPIC, _RESPONSES, _OLLAMA = "/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat"
SENT: list[tuple[str, dict[str, Any]]] = [
    *((path, _chat({name: "T"})) for path in (_CHAT, "/chat/completions", _OLLAMA) for name in _NAMES),
    (_CHAT, _chat({"reasoning": "T", "reasoning_details": [{"type": "reasoning.text", "text": "T", "format": None}]})),
    (_CHAT, _chat({"reasoning_details": [{"type": "reasoning.summary", "summary": "T"}]})),
    (_CHAT, _chat({"thinking_blocks": [{"type": "thinking", "thinking": "T", "signature": "s"}]})),
    (_CHAT, _chat({"reasoning_text": "T", "reasoning_content": ""})),
    (_CHAT, _chat({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "T"}], "closed": True}]})),
    (_ANTHROPIC, _blocks({"type": "thinking", "thinking": "T", "signature": "s"})),
    (_ANTHROPIC, _blocks({"type": "redacted_thinking", "data": "x"}, {"type": "thinking", "thinking": "T"})),
    (_RESPONSES, _items(summary=[], content=[{"type": "reasoning_text", "text": "T"}])),
    (_RESPONSES, _items(summary=[{"type": "summary_text", "text": "T"}], encrypted_content=None)),
]


@pytest.mark.parametrize("template", ["reasoning_content", "thinking"])
@pytest.mark.parametrize(("path", "body"), SENT)
async def test_every_form_of_every_api_reaches_a_template(path: str, body: dict[str, Any], template: str) -> None:
    assert "<assistant><think>T</think>" in await prompt_of(path, body, TEMPLATES[template])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ["", "C"])
async def test_every_template_gets_thoughts_and_content(name: str, content: str) -> None:
    prompt = await prompt_of(_CHAT, _chat({"reasoning": "T", "content": content}), TEMPLATES[name])
    shown = "<think>T\n\nC</think>" if name == "one of both" and content else f"<think>T</think>{content}"
    assert f"<user>Q<assistant>{shown}+{{}}<tool>R" in prompt


@pytest.mark.parametrize("name", TEMPLATES)
async def test_messages_without_thoughts_are_unchanged(name: str) -> None:
    prompt = await prompt_of(_CHAT, _chat({"content": "C", "reasoning_content": "", "thinking": None}), TEMPLATES[name])
    assert prompt.startswith("<user>Q<assistant>C+{}<tool>R")


@pytest.mark.parametrize("value", [7, {"a": 1}, [[["T"]]] * 2 + [5], True])
async def test_thoughts_of_another_form_are_refused_by_name(value: Any) -> None:
    async with client(make_app(ScriptedEngine(says("ok")))) as http:
        reply = await http.post(_CHAT, json=_chat({"thinking": value}))
    assert reply.status_code == 400 and "thinking: thoughts must be" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", [_CHAT, _OLLAMA])
@pytest.mark.parametrize("role", ["user", "system", "tool"])
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thinking_blocks"])
async def test_thoughts_of_other_roles_are_ignored_and_named(path: str, role: str, name: str) -> None:
    engine = ScriptedEngine(says("ok"))
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT]
    message = {"role": role, "content": "Q", name: "T"} | ({"tool_call_id": "c1"} if role == "tool" else {})
    place = {"user": 0, "system": 0, "tool": 2}[role]
    messages[place : place + (role != "system")] = [message]
    with ChatTemplate(TEMPLATES["thinking"], "", "") as made:
        async with client(make_app(engine, made)) as http:
            reply = await http.post(path, json={"model": MODEL, "stream": False, "messages": messages})
    assert reply.status_code == 200 and reply.headers["x-llamaclust-ignored"] == name, reply.text
    assert "T" not in tokenizer().decode(engine.submitted[0].prompt)


@pytest.mark.parametrize("kind", ["thinking", "reasoning"])
async def test_parts_with_thoughts_of_other_roles_are_ignored_and_named(kind: str) -> None:
    engine = ScriptedEngine(says("ok"))
    content = [{"type": kind, kind: "T"}, {"type": "text", "text": "Q"}]
    with ChatTemplate(TEMPLATES["thinking"], "", "") as made:
        async with client(make_app(engine, made)) as http:
            body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
            reply = await http.post(_CHAT, json=body)
    assert reply.status_code == 200 and reply.headers["x-llamaclust-ignored"] == "content.thinking", reply.text
    assert tokenizer().decode(engine.submitted[0].prompt) == "<user>Q"
