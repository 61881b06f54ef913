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


STRINGS = (
    "{% for m in messages %}{{ '<' + m.role + ('>' if m.name is undefined else ':' + m.name + '>') + m.content }}"
    "{% if loop.index0 > 9 %}{{ source_lang_code }}{% endif %}{% endfor %}"
)
BRANCHES = (
    "{% for m in messages %}{# name role index source_lang_code #}<{{ m.role }}>"
    "{% if m.content is string %}{{ m.content }}{% endif %}{% if loop.index0 < 0 %}{{ m.name }}{% endif %}{% endfor %}"
)
DUMPS = "{% for m in messages %}{# name index source_lang_code #}<{{ m.role }}>{{ m.content FILTER }}{% endfor %}"
PARTS = (
    "{% for m in messages %}{# name index source_lang_code #}<{{ m.role }}>{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
LISTS = (
    "{% for m in messages %}{# name index source_lang_code #}<{{ m.role }}>{% for p in m.content %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
PLAINLY = (STRINGS, BRANCHES, DUMPS.replace(" FILTER", ""), DUMPS.replace("FILTER", "| string"), PARTS, LISTS)
FIELDS: tuple[dict[str, Any], ...] = (
    {"index": 0},
    {"name": "Ann"},
    {"role": "user"},
    {"source_lang_code": "cs"},
    {"content": "x"},
    {"index": 1, "name": "Bob", "lang": {"a": [1]}},
)


@pytest.mark.parametrize("template", PLAINLY)
async def test_texts_are_joined_unless_the_template_reads_their_fields(template: str) -> None:
    for own in FIELDS:
        assert await prompt_of(template, user(text("hello", **own))) == "<user>hello", own
        assert await prompt_of(template, user(text("A"), text("B", **own))) == "<user>A\nB", own


@pytest.mark.parametrize(
    ("template", "parts", "shown"),
    [
        (TRANSLATES, [text("Ahoj", source_lang_code="cs", target_lang_code="de", index=0)], "<cs:de>Ahoj"),
        (TRANSLATES, [text("Ahoj", name="N", source_lang_code="cs", target_lang_code="de")], "<cs:de>Ahoj"),
        (TONES, [text("A", tone="plain", role="user"), text("B", tone="calm")], "[plain]A[calm]B"),
        (QUOTES, [text("A", quoted=False), text("B", quoted=True, index=1)], "A>B"),
    ],
)
async def test_other_fields_beside_those_that_the_template_reads_change_nothing(
    template: str, parts: list[Any], shown: str
) -> None:
    assert await prompt_of(template, user(*parts)) == shown


LANGUAGES = "{% set names = {'cs': 'Czech', 'de': 'German'} %}" + TRANSLATES.replace(
    "{{ p.source_lang_code }}",
    "{% if p.source_lang_code not in names %}{{ raise_exception('no language') }}{% endif %}"
    "{{ names[p.source_lang_code] }}",
)


async def test_a_template_that_refuses_other_values_gets_those_that_it_knows() -> None:
    parts = text("Ahoj", source_lang_code="cs", target_lang_code="de")
    assert await prompt_of(LANGUAGES, user(parts)) == "<Czech:de>Ahoj"


async def test_lists_of_parts_are_never_merged_as_if_they_were_texts() -> None:
    strict = "{% if messages | length > 1 and messages[0].role == messages[1].role %}{{ raise_exception('alternate') }}"
    template = strict + "{% endif %}" + QUOTES
    messages = [user(text("A", quoted=True)), user(text("B", quoted=True))]
    with pytest.raises(AssertionError, match="alternate"):
        await prompt_of(template, *messages)


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
