"""Tests of the forms in which templates read the thoughts of earlier answers, with llama.cpp's templates if present."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamaclust.model.chat.thoughts import with_shown_thoughts
from llamaclust.model.chat.tools.format_derivation import derive_format
from llamaclust.model.chat.tools.history import template_messages
from llamaclust.model.chat.tools.tool_format import ChannelCalls
from support.chat.llama_cpp_source import PACKAGE, find_source
from support.chat.sample_templates import form_of, render_with

THOUGHTS, TEXT = "Zthoughts", "Ztext"
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": '{"city": "Rome"}'}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SHOWING = (
    "ByteDance-Seed-OSS",
    "Cohere2MoE",
    "GLM-4.6",
    "GLM-4.7-Flash",
    "Kimi-K3",
    "LFM2.5-8B-A1B",
    "MiniMax-M2",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "Qwen-Qwen3-0.6B",
    "Qwen3.5-4B",
    "deepseek-ai-DeepSeek-V3.2",
    "deepseek-ai-DeepSeek-V4",
    "google-gemma-4-31B-it",
    "mistralai-Ministral-3-14B-Reasoning-2512",
    "muse-glimmer",
    "openai-gpt-oss-120b",
    "upstage-Solar-Open-100B",
)
"""Templates that show the thoughts of an answer that calls a tool."""


@pytest.fixture(scope="module")
def templates() -> Path:
    source = find_source()
    if source is None:
        pytest.skip(f"no source of llama.cpp; tests/support/chat/llama_cpp_source.py, run, fetches it ({PACKAGE})")
    return source / "models" / "templates"


def messages_without(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in each.items() if key != "reasoning_content"} for each in messages]


@pytest.mark.parametrize("content", ["", TEXT])
@pytest.mark.parametrize("name", SHOWING)
def test_real_templates_show_thoughts_once_beside_the_text(templates: Path, name: str, content: str) -> None:
    source = (templates / f"{name}.jinja").read_text(encoding="utf-8")
    render = render_with(source)
    form = derive_format(source, render)
    answer = {"role": "assistant", "content": content, "reasoning_content": THOUGHTS, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": CALL["id"], "name": "look", "content": "sun"}
    messages = template_messages(form, [{"role": "user", "content": "Q"}, answer, result], [TOOL])
    shown = [with_shown_thoughts(form, message) for message in messages]
    variables = {"tools": [TOOL], "enable_thinking": True, "bos_token": "", "eos_token": ""}
    text, plain = render(shown, True, variables), render(messages_without(messages), True, variables)
    assert text.count(THOUGHTS) == 1 and text.count(TEXT) == plain.count(TEXT)


@pytest.mark.parametrize("name", ["harmony", "muse", "functionary"])
def test_formats_with_channels_have_no_tags(name: str) -> None:
    form = form_of(name)
    assert isinstance(form.calls, ChannelCalls) and form.reasoning is None and form.knows_reasoning


@pytest.mark.parametrize("name", ["openai-gpt-oss-120b", "muse-glimmer", "meetkai-functionary-medium-v3.2"])
def test_real_formats_with_channels_have_no_tags(templates: Path, name: str) -> None:
    source = (templates / f"{name}.jinja").read_text(encoding="utf-8")
    form = derive_format(source, render_with(source))
    assert isinstance(form.calls, ChannelCalls) and form.reasoning is None


_LOOP = "{% for m in messages %}<{{ m.role }}>"
_CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.arguments | tojson }}]{% endfor %}{% endfor %}"
_REFUSES = "{% if m.content and m.thinking and m.tool_calls %}{{ raise_exception('one') }}{% endif %}"
_PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'thinking' %}[THINK]{{ p.thinking }}[/THINK]{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}"
)
_DUMPS = "{{ m.content }}"


@pytest.mark.parametrize(
    ("body", "takes_parts", "takes_both"),
    [
        (_REFUSES + "{{ m.thinking }}{{ m.content }}", False, False),
        (_PARTS, True, True),
        (_DUMPS, False, True),
        ("{{ m.reasoning }}{{ m.content }}", False, True),
        ("{{ m.thought }}" + _PARTS, False, True),
    ],
)
def test_forms_of_thoughts_are_derived(body: str, takes_parts: bool, takes_both: bool) -> None:
    source = "{# think #}" + _LOOP + body + _CALLS
    form = derive_format(source, render_with(source))
    assert (form.takes_thought_parts, form.takes_text_beside_thoughts) == (takes_parts, takes_both)


@pytest.mark.parametrize("content", ["C", [{"type": "text", "text": "C"}], "", None])
def test_a_message_without_thoughts_stays(content: Any) -> None:
    message = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    assert with_shown_thoughts(form_of("hermes"), message) == message
