"""Tests of models with separate templates for chats with tools and for chats with documents."""

from __future__ import annotations

from typing import Any

import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.chat.template import ChatTemplate, load_chat_template
from support.clusters.served import ScriptedEngine, client, make_app, says, tokenizer

MESSAGES = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
PLAIN = "P" + MESSAGES
TOOL_USE = (
    "T{% for t in tools or [] %}+{{ t.function.name }}{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    '{% for c in m.tool_calls or [] %}Action:{"tool_name": "{{ c.function.name }}", "parameters": '
    "{{ c.function.arguments | tojson }}}{% endfor %}{% endfor %}"
)
RAG = "R{% for d in documents or [] %}<{{ d.text }}>{% endfor %}" + MESSAGES
NAMED = {"tool_use": TOOL_USE, "rag": RAG}
USER = {"role": "user", "content": "a"}
TOOLS = [{"type": "function", "function": {"name": "look"}}]
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "look"}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "r"}
DOCUMENTS = [{"title": "t", "text": "d"}]


async def prompt(named: dict[str, str], fields: dict[str, Any], plain: str = PLAIN) -> str:
    """Returns the prompt that the templates render or the error message."""
    with ChatTemplate(plain, "", "", named=named) as template:
        async with client(make_app(ScriptedEngine(says("a")), template)) as http:
            reply = (await http.post("/apply-template", json={"messages": [USER], **fields})).json()
    return str(reply.get("prompt") or reply["error"]["message"])


@pytest.mark.parametrize(
    ("fields", "begin"),
    [
        ({}, "P["),
        ({"tools": TOOLS}, "T+look["),
        ({"tools": TOOLS, "tool_choice": "none"}, "P["),
        ({"messages": [USER, CALLED, RESULT]}, "T["),
        ({"documents": DOCUMENTS}, "R<d>["),
        ({"chat_template_kwargs": {"documents": DOCUMENTS}}, "R<d>["),
        ({"documents": []}, "P["),
    ],
)
async def test_a_chat_gets_the_template_of_its_kind(fields: dict[str, Any], begin: str) -> None:
    assert (await prompt(NAMED, fields)).startswith(begin)


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS}])
async def test_a_model_with_one_template_has_it_for_all(fields: dict[str, Any]) -> None:
    assert (await prompt({}, fields)).startswith("P[")


async def test_documents_that_no_template_shows_are_refused() -> None:
    assert (await prompt({}, {"documents": DOCUMENTS})).startswith(
        "documents: the model's chat template does not show documents"
    )
    assert (await prompt({}, {"documents": DOCUMENTS}, RAG)).startswith("R<d>[")


async def test_answers_have_the_form_of_the_template_of_their_chat() -> None:
    engine = ScriptedEngine(says('Action:{"tool_name": "look", "parameters": {}}'))
    with ChatTemplate(PLAIN, "", "", named=NAMED) as template:
        async with client(make_app(engine, template)) as http:
            body = {"messages": [USER], "tools": TOOLS}
            message = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
            shown = (await http.get("/props")).json()
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["look"]
    assert (shown["chat_template"], shown["chat_template_tool_use"]) == (PLAIN, TOOL_USE)


@pytest.mark.parametrize("name", ["tool_use", "rag"])
def test_templates_of_a_file(name: str) -> None:
    metadata = {"tokenizer.chat_template": PLAIN, f"tokenizer.chat_template.{name}": NAMED[name]}
    with load_chat_template({**metadata, "tokenizer.chat_templates": [name]}, tokenizer()) as template:
        assert {key: made.source for key, made in template.named.items()} == {name: NAMED[name]}
    with load_chat_template(metadata, tokenizer(), chosen="chosen") as template:
        assert (template.source, template.named) == ("chosen", {})
    with pytest.raises(ModelFileError, match=f"chat_template.{name} is not text"):
        load_chat_template({f"tokenizer.chat_template.{name}": 3}, tokenizer())
