"""The grammar of tool calls in llguidance's dialect of Lark. It has the model's markers, tool names and arguments."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from llamaclust.model.chat.tools.call_sink import Tools
from llamaclust.model.chat.tools.constraint.lark_rules import (
    COMMA,
    LAYOUT,
    SPACE,
    LarkRules,
    Split,
    joined,
    json_value,
    marker,
)
from llamaclust.model.chat.tools.constraint.notated_calls import notated_section
from llamaclust.model.chat.tools.constraint.object_calls import object_call
from llamaclust.model.chat.tools.constraint.tagged_calls import tagged_call
from llamaclust.model.chat.tools.tool_format import (
    ChannelCalls,
    NamedCalls,
    NotatedCalls,
    ObjectCalls,
    ReasoningTags,
    TaggedCalls,
    ToolFormat,
)
from llamaclust.model.grammars.definitions import quoted

FramedCalls = ObjectCalls | NamedCalls | TaggedCalls | NotatedCalls
_NAMED_ID: Final = "/[a-zA-Z0-9_-]{1,40}/"


class CallStart(Enum):
    TRIGGER = auto()  # Calls start where the model writes their first marker.
    ANSWER = auto()  # Calls start with the answer, or after reasoning.
    THOUGHT = auto()  # Calls start after reasoning that begins in the prompt.
    ALTERNATIVE = auto()  # Calls start with the answer's first token, but the answer may have another form instead.


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """A Lark grammar of tool calls. It applies from the first of `triggers` on, or always if there are none."""

    lark: str
    triggers: tuple[str, ...] = ()


def call_grammar(
    form: ToolFormat, tools: Tools, split: Split, start: CallStart, *, is_parallel: bool
) -> CallGrammar | None:
    """Returns the grammar, or None if no call may begin at `start`. `tools` has schemas from `arguments_schema`."""
    rules = LarkRules(split)
    calls = form.calls
    if calls is None or not tools:
        return None
    if isinstance(calls, ChannelCalls):
        if start is CallStart.TRIGGER:
            return None
        return CallGrammar(rules.lark(_channel_call(rules, calls, tools, reasons=start is not CallStart.ALTERNATIVE)))
    if start is CallStart.TRIGGER and not calls.frame.lines:
        return None
    section = _section(rules, calls, tools, is_parallel=is_parallel)
    if start in (CallStart.ANSWER, CallStart.THOUGHT):
        thoughts = _reasoning(rules, form.reasoning, is_thinking=start is CallStart.THOUGHT)
        return CallGrammar(rules.lark(joined(SPACE, thoughts, section)))
    return CallGrammar(rules.lark(section), calls.frame.lines[:1] if start is CallStart.TRIGGER else ())


def _reasoning(rules: LarkRules, tags: ReasoningTags | None, *, is_thinking: bool) -> str:
    if tags is None:
        return ""
    thoughts = f"{rules.text_until(tags.end)} {SPACE}"
    return thoughts if is_thinking else f"({rules.literal(tags.begin)} {thoughts})?"


def _section(rules: LarkRules, calls: FramedCalls, tools: Tools, *, is_parallel: bool) -> str:
    frame = calls.frame
    if isinstance(calls, NotatedCalls):
        return notated_section(rules, calls, tools, is_parallel=is_parallel)
    is_list = isinstance(calls, ObjectCalls) and calls.is_list
    head, tail = marker(rules, frame.call_begin), marker(rules, frame.call_end)
    inner = rules.rule(_calls(rules, calls, tools))
    call = rules.rule(inner if is_list else joined(head, inner, SPACE, tail))
    several = f"{call} ({COMMA if is_list else SPACE} {call})*" if is_parallel else call
    if is_list:
        several = f'"[" {LAYOUT} {several} {LAYOUT} "]" {SPACE}'
    return joined(marker(rules, frame.section_begin), several, marker(rules, frame.section_end))


def _calls(rules: LarkRules, calls: ObjectCalls | NamedCalls | TaggedCalls, tools: Tools) -> str:
    """Returns the rule for a call of any tool. Tools differ as late as possible, because llguidance follows all."""
    match calls:
        case ObjectCalls():
            return object_call(rules, calls, tools)
        case NamedCalls():
            before = f"{_NAMED_ID} {marker(rules, calls.name_begin)}" if calls.name_begin else ""
            bodies = (_named(rules, calls, name, json_value(rules, schema)) for name, schema in tools.items())
            return f"{before} ({' | '.join(map(rules.rule, bodies))})"
        case TaggedCalls():
            return " | ".join(rules.rule(tagged_call(rules, calls, name, schema)) for name, schema in tools.items())


def _named(rules: LarkRules, calls: NamedCalls, name: str, arguments: str) -> str:
    shown = quoted(f"functions.{name}:") + " /[0-9]{1,3}/" if calls.has_name_in_id else quoted(name)
    behind = f"({rules.literal(calls.id_begin)} {_NAMED_ID})?" if calls.id_begin else ""
    return joined(shown, behind, SPACE, marker(rules, calls.name_end), arguments, SPACE)


def _channel_call(rules: LarkRules, calls: ChannelCalls, tools: Tools, *, reasons: bool) -> str:
    bodies = []
    for name, schema in tools.items():
        header = rules.literal(calls.call_header.format(name=name) + calls.header_end)
        body = (
            json_value(rules, schema)
            if calls.calls is None
            else _section(rules, calls.calls, {name: schema}, is_parallel=False)
        )
        bodies.append(rules.rule(joined(header, body)))
    call = f"({' | '.join(bodies)})"
    if not reasons or not calls.message_ends or calls.reasoning_header == calls.content_header:
        return call
    thoughts = rules.text_until(calls.message_ends[0])
    begin = rules.literal(calls.reasoning_header + calls.header_end)
    return f"({begin} {thoughts} {rules.literal(calls.message_begin)})? {call}"
