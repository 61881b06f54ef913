"""Tests of texts with keys that only the chat template knows, and of answers without text that a template refuses."""

from __future__ import annotations

from typing import Any

import pytest

from llamaclust.model.chat.template import ChatTemplate
from support.clusters.served import MODEL, ScriptedEngine, client, make_app, says, tokenizer

TRANSLATES = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if m.content is string or m.content | length != 1 %}"
    "{{ raise_exception('needs one part') }}{% endif %}{% set p = m.content[0] %}"
    "<{{ p.source_lang_code }}:{{ p.target_lang_code }}>{{ p.text }}{% else %}={{ m.content }}{% endif %}{% endfor %}"
)
TONES = "{% for m in messages %}{% for p in m.content %}[{{ p.tone or 'plain' }}]{{ p.text }}{% endfor %}{% endfor %}"
QUOTES = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.quoted %}>{{ p.text }}{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
)
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
FILLED = (
    "{% for m in messages %}{% if m.role == 'assistant' and not m.content %}"
    "{{ raise_exception('empty') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
LENIENT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def text(value: str, **own: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **own}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*parts]}


async def prompt_of(template: str, *messages: dict[str, Any]) -> str:
    engine = ScriptedEngine(says("ok"))
    with ChatTemplate(template, "", "") as made:
        async with client(make_app(engine, made)) as http:
            reply = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert reply.status_code == 200, reply.text
    return tokenizer().decode(engine.submitted[0].prompt)


@pytest.mark.parametrize(
    ("template", "parts", "shown"),
    [
        (TRANSLATES, [text("Ahoj", source_lang_code="cs", target_lang_code="de")], "<cs:de>Ahoj"),
        (TONES, [text("A", tone="calm"), text("B")], "[calm]A[plain]B"),
        (QUOTES, [text("A", quoted=True), text("B", quoted=False)], ">AB"),
        (QUOTES, [text("A", cache_control={}), text("B", annotations=[])], "A\nB"),
        (PLAIN, [text("A", quoted=True), text("B", tone="calm")], "<user>A\nB"),
        (TONES.replace("m.content", "[m.content[0]]"), [text("<s>", tone="<s>")], "[<s>]<s>"),
    ],
)
async def test_a_template_gets_the_keys_that_it_knows(template: str, parts: list[Any], shown: str) -> None:
    assert await prompt_of(template, user(*parts)) == shown


A = {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        ([user(text("Q")), A, user(text("R"))], "<user>Q\n\nR"),
        ([user(text("Q")), {**A, "content": None}, user(text("R")), {**A, "content": "S"}, user(text("T"))], None),
        ([A, user(text("Q"))], "<user>Q"),
        ([user(text("Q")), A, A, user(text("R"))], "<user>Q\n\nR"),
    ],
)
async def test_answers_without_text_are_left_out_where_a_template_refuses_them(
    messages: list[dict[str, Any]], shown: str | None
) -> None:
    expected = shown or "<user>Q\n\nR<assistant>S<user>T"
    assert await prompt_of(FILLED, *messages) == expected
    assert "<assistant><" in await prompt_of(LENIENT, *messages), "other templates get them as they are"
