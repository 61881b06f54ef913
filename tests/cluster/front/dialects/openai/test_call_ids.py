"""Tests of call ids, in all APIs and from any source, with a chat template that accepts only nine letters and digits,
like Mistral's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llamaclust.model.chat.template import ChatTemplate
from llamaclust.model.chat.tools.format_derivation import derive_format
from llamaclust.model.chat.tools.history import template_messages
from support.chat.sample_templates import TEMPLATES, render_with
from support.clusters.served import ScriptedEngine, client, make_app, says, tokenizer

_CHECK = "{% if X is not defined or X | length != 9 %}{{ raise_exception('ids must have 9 characters') }}{% endif %}"
TEMPLATE = (
    "{% for t in tools or [] %}+{{ t.function.name }}{% endfor %}{% for m in messages %}{% if m.tool_calls %}"
    "[TOOL_CALLS][{% for c in m.tool_calls %}" + _CHECK.replace("X", "c.id") + "{% if not loop.first %}, {% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% endfor %}]"
    "{% elif m.role == 'tool' %}"
    + _CHECK.replace("X", "m.tool_call_id")
    + "[R]{{ m.content }}/{{ m.tool_call_id }}[/R]"
    "{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
FORM = derive_format(TEMPLATE, render_with(TEMPLATE))
CALL = '[TOOL_CALLS][{"name": "look", "arguments": {}}]'
ID_CALL = '[TOOL_CALLS][{"name": "look", "arguments": {}, "id": "abc123XYZ"}]'
SCHEMA = {"type": "object", "properties": {}}
FUNCTION = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
USER = {"role": "user", "content": "a"}

Turns = Callable[[Any], dict[str, Any]]
"""Returns the body that follows a reply, with the result of its call, or the first body for None."""


def chat_turns(reply: Any) -> dict[str, Any]:
    if reply is None:
        return {"messages": [USER], "tools": [FUNCTION]}
    message = reply["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "r"}
    return {"messages": [USER, message, result], "tools": [FUNCTION]}


def response_turns(reply: Any) -> dict[str, Any]:
    tools = [{"type": "function", "name": "look", "parameters": SCHEMA}]
    if reply is None:
        return {"input": "a", "tools": tools}
    (call,) = reply["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "r"}
    return {"input": [USER, call, result], "tools": tools}


def message_turns(reply: Any) -> dict[str, Any]:
    body = {"messages": [USER], "tools": [{"name": "look", "input_schema": SCHEMA}], "max_tokens": 90}
    if reply is None:
        return body
    (use,) = reply["content"]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"], "content": "r"}]}
    return {**body, "messages": [USER, {"role": "assistant", "content": [use]}, result]}


def ollama_turns(reply: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [USER], "tools": [FUNCTION], "stream": False}
    if reply is None:
        return body
    return {**body, "messages": [USER, reply["message"], {"role": "tool", "tool_name": "look", "content": "r"}]}


APIS: dict[str, Turns] = {
    "/v1/chat/completions": chat_turns,
    "/v1/responses": response_turns,
    "/v1/messages": message_turns,
    "/api/chat": ollama_turns,
}


async def post(path: str, body: Any, answer: str) -> tuple[Any, str]:
    """Returns the reply and the engine's prompt."""
    engine = ScriptedEngine(says(answer))
    with ChatTemplate(TEMPLATE, "", "") as template:
        async with client(make_app(engine, template)) as http:
            reply = await http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json(), tokenizer().decode(engine.submitted[0].prompt)


@pytest.mark.parametrize("answer", [CALL, ID_CALL])
@pytest.mark.parametrize("path", APIS)
async def test_a_call_is_taken_back_with_its_result(path: str, answer: str) -> None:
    turns = APIS[path]
    reply, _ = await post(path, turns(None), answer)
    _, prompt = await post(path, turns(reply), "a")
    call, result = prompt.split('"id": "')[1][:9], prompt.split("[R]r/")[1][:9]
    assert call == result
    if answer == ID_CALL and path in ("/v1/chat/completions", "/api/chat"):  # others send a call before its id is known
        assert call == "abc123XYZ"


@pytest.mark.parametrize(
    "given", ["call_abc", "toolu_01A09q90qw90lq917835lq9", "0" * 32, "functions.look:0", "chatcmpl-tool-é", "a b c d e"]
)
def test_ids_of_others_are_in_the_templates_form(given: str) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [{"id": given, "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": given, "content": "r"},
    ]
    call, result = template_messages(FORM, messages, [])
    assert call["tool_calls"][0]["id"] == result["tool_call_id"]
    assert len(result["tool_call_id"]) == 9 and result["tool_call_id"].isalnum()
    assert template_messages(FORM, messages, []) == [call, result], "always the same"


def test_results_without_ids_are_those_of_their_calls() -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("f", "g", "f")]
    results = [{"role": "tool", "name": name, "content": "r"} for name in ("g", "f")] + [
        {"role": "tool", "content": "r"}
    ]
    made = template_messages(FORM, [{"role": "assistant", "tool_calls": calls}, *results], [])
    first, second, third = (call["id"] for call in made[0]["tool_calls"])
    assert len({first, second, third}) == 3
    assert [message["tool_call_id"] for message in made[1:]] == [second, first, third]


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_templates_get_ids_as_they_are(name: str) -> None:
    assert derive_format(TEMPLATES[name], render_with(TEMPLATES[name])).call_id_length == 0
