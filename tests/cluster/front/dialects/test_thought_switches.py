"""Tests of the fields that switch thoughts on or off or limit them: one meaning in every API."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from llamaclust.model.chat.template import ChatTemplate
from support.clusters.served import MODEL, ScriptedEngine, client, make_app, says, tokenizer

OPENS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "[{{ enable_thinking }},{{ thinking }},{{ reasoning_effort }}]{% if add_generation_prompt %}<think>\n{% endif %}"
)
"""A template that always opens the thoughts."""
HELLO = {"model": MODEL, "stream": False, "messages": [{"role": "user", "content": "Hi"}]}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": HELLO,
    "/chat/completions": HELLO,
    "/v1/messages": HELLO | {"max_tokens": 9},
    "/v1/responses": {"model": MODEL, "input": "Hi"},
    "/api/chat": HELLO,
    "/api/generate": {"model": MODEL, "stream": False, "prompt": "Hi"},
}
OFF: list[dict[str, Any]] = [
    {"reasoning_effort": "none"},
    {"enable_thinking": False},
    {"thinking": False},
    {"thinking": {"type": "disabled"}},
    {"think": False},
    {"think": "off"},
    {"reasoning": {"effort": "none"}},
    {"reasoning": {"enabled": False}},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"thinking": False}},
    {"thinking": {"type": "disabled"}, "reasoning_effort": "high"},
    {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"thinking_budget": 0}},
    {"chat_template_kwargs": {"thinking_mode": "disabled"}},
    {"chat_template_kwargs": {"reasoning": False}},
    {"chat_template_kwargs": {"thinking_effort": "none"}},
    {"chat_template_kwargs": {"reasoning_effort": "high", "thinking_mode": "disabled"}},
    {"think": "high", "chat_template_kwargs": {"thinking_budget": 0}},
    {"reasoning_budget": 0},
    {"thinking": {"budget_tokens": 0}, "reasoning_budget": 0},
]
AMOUNTS: list[tuple[dict[str, Any], str | None, int | None]] = [
    ({"reasoning_effort": "low"}, "low", None),
    ({"think": "high"}, "high", None),
    ({"reasoning": {"effort": "medium", "max_tokens": 7}}, "medium", 7),
    ({"reasoning": {"max_tokens": 5}, "reasoning_effort": "low"}, "low", 5),
    ({"thinking": {"type": "enabled", "budget_tokens": 3}}, None, 3),
    ({"thinking": {"type": "adaptive"}, "reasoning": {"effort": "auto"}}, None, None),
    ({"enable_thinking": True}, None, None),
]


async def sent(path: str, fields: dict[str, Any], **settings: Any) -> tuple[Any, str, ScriptedEngine]:
    engine = ScriptedEngine(says("Yes."))
    if path.startswith("/api/"):  # Ollama's limits are options.
        options = {name: value for name, value in fields.items() if name.endswith("_budget")}
        fields = {name: value for name, value in fields.items() if name not in options} | {"options": options}
    with ChatTemplate(OPENS, "", "") as made:
        async with client(make_app(engine, made, **settings)) as http:
            reply = await http.post(path, json=PATHS[path] | fields)
    prompt = tokenizer().decode(engine.submitted[0].prompt) if engine.submitted else ""
    return reply, prompt, engine


@pytest.mark.parametrize(("path", "fields"), [*product(PATHS, OFF)])
async def test_off_closes_the_thoughts_that_the_template_opens(path: str, fields: dict[str, Any]) -> None:
    reply, prompt, engine = await sent(path, fields)
    assert reply.status_code == 200 and "x-llamaclust-ignored" not in reply.headers, reply.text
    assert "[False," in prompt or "chat_template_kwargs" in fields
    assert prompt.endswith("<think>\n</think>\n\n") and "Yes." in reply.text
    reasoning = engine.submitted[0].reasoning
    assert reasoning is not None and reasoning.budget == 0, "thoughts that the model begins itself end at once"


@pytest.mark.parametrize(("path", "case"), [*product(PATHS, AMOUNTS)])
async def test_amounts_reach_template_and_engine(
    path: str, case: tuple[dict[str, Any], str | None, int | None]
) -> None:
    fields, effort, budget = case
    reply, prompt, engine = await sent(path, fields)
    assert reply.status_code == 200 and "x-llamaclust-ignored" not in reply.headers, reply.text
    assert prompt.endswith(f",{effort or ''}]<think>\n")
    reasoning = engine.submitted[0].reasoning
    assert (None if reasoning is None else reasoning.budget) == budget


@pytest.mark.parametrize("path", PATHS)
async def test_a_chat_without_a_switch_leaves_the_template_its_own(path: str) -> None:
    _, prompt, engine = await sent(path, {})
    assert prompt.endswith("[True,,]<think>\n") and engine.submitted[0].reasoning is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"enable_thinking": True, "think": False}, "enable_thinking"),
        ({"thinking": {"type": "enabled"}, "reasoning": {"enabled": False}}, "thinking.type"),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning_effort"),
        ({"thinking": {"budget_tokens": 5}, "reasoning": {"max_tokens": 9}}, "thinking.budget_tokens"),
        ({"thinking": {"budget_tokens": 100}, "reasoning_budget": 0}, "reasoning_budget"),
        ({"think": {"budget_tokens": 0}, "thinking_budget": 7}, "reasoning_budget"),
        ({"reasoning": {"max_tokens": 8}, "reasoning_budget": 9}, "reasoning_budget"),
    ],
)
async def test_two_fields_that_contradict_each_other_are_both_named(
    path: str, fields: dict[str, Any], named: str
) -> None:
    reply, _, engine = await sent(path, fields)
    assert reply.status_code == 400 and not engine.submitted
    assert f"contradicts {named}" in reply.text


@pytest.mark.parametrize(
    ("path", "value"), [*product(PATHS, ["much", 5, {"type": "sometimes"}, {"budget_tokens": -1}])]
)
async def test_other_values_are_refused(path: str, value: Any) -> None:
    reply, _, _ = await sent(path, {"think": value})
    assert reply.status_code == 400 and "think" in reply.text


@pytest.mark.parametrize("default", [{"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}])
async def test_a_switch_of_the_request_precedes_the_cluster_files(default: dict[str, Any]) -> None:
    path = "/v1/chat/completions"
    assert (await sent(path, {}, defaults=default))[1].endswith("</think>\n\n")
    for fields in ({"reasoning_effort": "high"}, {"thinking": {"type": "enabled"}}, {"enable_thinking": True}):
        assert (await sent(path, fields, defaults=default))[1].endswith("<think>\n")


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({"reasoning_effort": "none"}, {"reasoning_effort": "high"}),
        ({"thinking": False}, {"thinking_mode": "enabled"}),
        ({"enable_thinking": False}, {"reasoning": True}),
        ({"think": "off"}, {"thinking_effort": "low"}),
    ],
)
async def test_variables_of_the_template_override_a_switch_that_is_off(
    fields: dict[str, Any], variables: dict[str, Any]
) -> None:
    reply, prompt, engine = await sent("/v1/chat/completions", fields | {"chat_template_kwargs": variables})
    assert reply.status_code == 200 and "[True," in prompt and prompt.endswith("]<think>\n")
    assert engine.submitted[0].reasoning is None


async def test_a_budget_of_the_request_precedes_the_cluster_files() -> None:
    for fields in ({"thinking": {"budget_tokens": 5}}, {"reasoning": {"max_tokens": 5}}, {"reasoning_budget": 5}):
        reply, _, engine = await sent("/v1/chat/completions", fields, defaults={"reasoning_budget": 100})
        assert reply.status_code == 200, reply.text
        reasoning = engine.submitted[0].reasoning
        assert reasoning is not None and reasoning.budget == 5


async def test_effort_of_an_output_config_is_an_amount() -> None:
    _, prompt, _ = await sent("/v1/messages", {"output_config": {"effort": "max"}})
    assert prompt.endswith(",max]<think>\n")
    _, prompt, _ = await sent("/v1/messages", {"output_config": {"effort": "max"}, "thinking": {"type": "disabled"}})
    assert prompt.endswith("</think>\n\n")
