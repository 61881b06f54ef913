"""Runs llama.cpp's test cases with the formats derived from its templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from llamaclust.core.errors import RequestError
from llamaclust.model.chat.template_child import environment, functions_of
from llamaclust.model.chat.template_probe import Message, Render
from llamaclust.model.chat.tools.answer_parser import AnswerParser
from llamaclust.model.chat.tools.begun_answer import continuation, opened_reasoning
from llamaclust.model.chat.tools.events import AnswerEvent, ParsedAnswer
from llamaclust.model.chat.tools.format_derivation import derive_format
from llamaclust.model.chat.tools.tool_format import ToolFormat
from support.chat.llama_cpp_cases import Case

_USER = {"role": "user", "content": "Hey there!"}


@dataclass(frozen=True)
class Template:
    """A chat template and its format."""

    render: Render
    form: ToolFormat


@lru_cache(maxsize=128)
def load_template(path: Path) -> Template:
    """Loads a template that is rendered in this process; its source must be trusted."""
    source = path.read_text(encoding="utf-8")
    compiled = environment().from_string(source)

    def render(messages: Sequence[Message], add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        more = {key: value for key, value in variables.items() if value or key != "tools"}
        more["functions"] = functions_of(variables.get("tools"))
        given = {"bos_token": "<s>", "eos_token": "</s>", "datetime": "Nov 22 2026", **more}
        try:
            return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **given)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise RequestError(str(error)) from error

    return Template(render, derive_format(source, render))


def make_parser(template: Template, case: Case) -> tuple[AnswerParser, str]:
    """Returns a parser and the start of the answer that the prompt contains, since llama.cpp's messages include it."""
    options = case.options
    tools = options.get("tools") or None
    variables = {"tools": tools, "enable_thinking": options.get("enable_thinking", True)}
    messages = [_as_dict(message) for message in options.get("messages", [])] or [_USER]
    continued = options.get("continue_final_message")
    last = options["messages"][-1] if continued else None
    prompt = template.render(messages[:-1] if continued else messages, True, variables)
    splits = options.get("reasoning_format", "NONE").rpartition("_")[2] != "NONE"
    begun = opened_reasoning(template.form, prompt) if splits else ""
    if last is not None:
        in_reasoning = str(continued).endswith("REASONING")
        reasoning = last.reasoning if splits else ""
        begun += continuation(template.form, prompt, reasoning, last.content, in_reasoning=in_reasoning)
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools or ()}
    most = None if options.get("parallel_tool_calls") else 1
    return AnswerParser(template.form, schemas, splits_reasoning=splits, most_calls=most), begun


def run_case(template: Template, case: Case, pieces: Sequence[str] | None = None) -> str:
    """Returns the difference from the expected message, or an empty text."""
    answer = ParsedAnswer()
    answer.add(case_events(template, case, [case.text] if pieces is None else pieces))
    expected = case.expected
    is_partial = bool(case.options.get("is_partial"))
    got = (answer.reasoning.strip(), answer.content.strip(), _calls(answer, is_partial))
    calls = [(name, _canonical(arguments, is_partial), call_id) for name, arguments, call_id in expected.calls]
    want = (expected.reasoning.strip(), expected.content.strip(), calls)
    return "" if got == want else f"got {got}, expected {want}"


def case_events(template: Template, case: Case, pieces: Sequence[str]) -> list[AnswerEvent]:
    """Returns all events of an answer that is parsed in pieces."""
    parser, begun = make_parser(template, case)
    return [*(event for piece in [begun, *pieces] for event in parser.feed(piece)), *parser.end()]


def _calls(answer: ParsedAnswer, is_partial: bool) -> list[tuple[str, str, str]]:
    return [(call.name, _canonical(call.arguments, is_partial), call.call_id) for call in answer.calls]


def _canonical(arguments: str, is_partial: bool) -> str:
    if is_partial:
        return "".join(arguments.split())
    try:
        return json.dumps(json.loads(arguments))
    except ValueError:
        return arguments


def _as_dict(message: Any) -> dict[str, Any]:
    calls = [
        {"type": "function", "id": call_id, "function": {"name": name, "arguments": json.loads(arguments)}}
        for name, arguments, call_id in message.calls
    ]
    return {"role": message.role, "content": message.content, **({"tool_calls": calls} if calls else {})}
