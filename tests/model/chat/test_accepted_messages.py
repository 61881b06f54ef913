"""Checks that messages are changed into a form that strict templates accept, with all texts in their order."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from llamaclust.cluster.front.text.request import ChatRequest, PromptEnd
from llamaclust.core.errors import RequestError
from llamaclust.model.chat.accepted_messages import accepted_forms, lacks_system
from llamaclust.model.chat.template import ChatTemplate
from support.chat.strict_templates import STRICT_TEMPLATES
from support.clusters.served import ScriptedEngine, make_service, says
from support.seed import SEED

FREE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
CHATS = (
    *("su", "us", "usu", "susau", "suasu", "usau", "uasu", "ssu", "suu", "uuaau", "au", "sau", "aas", "s", "ss", "a"),
    *("uas", "uuss", "suasasu", "sssaaauuu"),
)


def chat(kinds: str) -> list[dict[str, Any]]:
    return [{"role": ROLES[kind], "content": f"text{place}{kind}"} for place, kind in enumerate(kinds)]


async def prompt(source: str, messages: list[dict[str, Any]], **more: Any) -> str:
    with ChatTemplate(source, "<s>", "</s>") as template:
        service = make_service(ScriptedEngine(says("a")), template=template)
        return await service.chat_text(ChatRequest(tuple(messages), end=PromptEnd.NOTHING, **more))


def assert_all(text: str, messages: list[dict[str, Any]]) -> None:
    """Asserts that each text occurs once, in order except for leading system messages."""
    contents = [message["content"] for message in messages]
    assert [text.count(content) for content in contents] == [1] * len(contents), text
    begin = next((place for place, message in enumerate(messages) if message["role"] != "system"), 0)
    places = [text.index(content) for content in contents[begin:]]
    assert places == sorted(places), text


@pytest.mark.parametrize("name", STRICT_TEMPLATES)
async def test_strict_templates_show_all_texts(name: str) -> None:
    for kinds in CHATS:
        assert_all(await prompt(STRICT_TEMPLATES[name], chat(kinds)), chat(kinds))


@pytest.mark.parametrize("name", STRICT_TEMPLATES)
async def test_random_chats(name: str) -> None:
    source = Random(SEED)
    for _ in range(10):
        kinds = "".join(source.choices("sua", (1, 2, 2), k=source.randint(1, 12)))
        assert_all(await prompt(STRICT_TEMPLATES[name], chat(kinds)), chat(kinds))


async def test_what_a_template_accepts_is_not_changed() -> None:
    for kinds in CHATS:
        assert await prompt(FREE, chat(kinds)) == "".join(f"<{m['role']}>{m['content']}" for m in chat(kinds))


async def test_a_chat_that_grows_keeps_its_beginning() -> None:
    """Checks that the prefix cache can reuse the prompt's beginning."""
    for name in ("no system role", "system is skipped", "later systems are skipped"):
        before = await prompt(STRICT_TEMPLATES[name], chat("sus"))
        assert (await prompt(STRICT_TEMPLATES[name], chat("susau"))).startswith(before)


def test_a_later_system_message_joins_the_turn_beside_it() -> None:
    def first(kinds: str) -> list[tuple[str, str]]:
        return [(message["role"], message["content"]) for message in next(accepted_forms(chat(kinds)))]

    assert first("us") == [("user", "text0u\n\ntext1s")]
    assert first("uasu") == [("user", "text0u"), ("assistant", "text1a"), ("user", "text2s\n\ntext3u")]
    assert first("uasa")[2:] == [("user", "text2s"), ("assistant", "text3a")]
    assert first("uastu")[2:] == [("tool", "text3t"), ("user", "text2s\n\ntext4u")]
    assert first("uats")[2:] == [("tool", "text2t"), ("user", "text3s")]


def test_merged_messages_keep_calls_and_reasoning() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answers = [
        {"role": "assistant", "content": "", "reasoning_content": "one", "tool_calls": [call]},
        {"role": "assistant", "content": "text", "reasoning_content": "two", "tool_calls": [{**call, "id": "2"}]},
    ]
    (_, merged), *_ = accepted_forms([{"role": "user", "content": "a"}, *answers])
    assert merged["content"] == "text" and merged["reasoning_content"] == "one\ntwo"
    assert [made["id"] for made in merged["tool_calls"]] == ["1", "2"]
    results = [{"role": "tool", "content": str(place)} for place in range(2)]
    assert all(form[-2:] == results for form in accepted_forms([{"role": "system", "content": "a"}, *results]))


def test_a_system_message_that_is_missing_is_noticed() -> None:
    long = "a" * 100 + "b"
    system = [{"role": "system", "content": f" {long}\n"}]
    assert not lacks_system(system, f"<s>{long}</s>")
    assert lacks_system(system, "<s>" + "a" * 100) and lacks_system(system, "")
    assert not lacks_system([{"role": "system", "content": None}, {"role": "user", "content": "x"}], "")


@pytest.mark.parametrize("name", ["gemma", "mistral", "llama-2"])
async def test_calls_and_results_where_the_template_refuses_them(name: str) -> None:
    """Checks that calls and results become text in a template that knows tools but refuses these roles."""
    source = "{%- set known = tools -%}" + STRICT_TEMPLATES[name]
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "stars"}'}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "many"}
    text = await prompt(source, [*chat("su"), asked, result, *chat("su")])
    assert '"at": "stars"' in text and '"many"' in text


async def test_a_template_that_refuses_everything_says_why() -> None:
    source = "{% if messages | length > 0 %}{{ raise_exception('never ' ~ messages | length) }}{% endif %}"
    with pytest.raises(RequestError, match="never 3"):
        await prompt(source, chat("usu"))
