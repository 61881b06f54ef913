"""The grammar of tool calls in llguidance's dialect of Lark. It has the model's markers, tool names and arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from llamaclust.model.chat.tools.argument_values import STRING, types_of
from llamaclust.model.chat.tools.call_sink import Schema, Tools
from llamaclust.model.chat.tools.constraint.lark_rules import SPACE, LarkRules, Split, joined
from llamaclust.model.chat.tools.constraint.notated_calls import notated_section
from llamaclust.model.chat.tools.tool_format import (
    ChannelCalls,
    NamedCalls,
    NotatedCalls,
    ObjectCalls,
    ReasoningTags,
    TaggedCalls,
    ToolFormat,
)
from llamaclust.model.grammars.definitions import GUIDANCE, JSON_TEXT, quoted

FramedCalls = ObjectCalls | NamedCalls | TaggedCalls | NotatedCalls
_ID: Final = r'/"[a-zA-Z0-9_-]{1,40}"/'
_JSON_PART: Final = re.compile(r'"(?:[^"\\]|\\.)*"|\s+|.')
_ANY_KEY: Final = r'/[^<>"=\s]{1,64}/'
_OPTIONS: Final = {**JSON_TEXT, "coerce_one_of": True}
"""Options for schemas. `oneOf` is treated like `anyOf`, as in llama.cpp, because alternatives rarely overlap."""


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
        return CallGrammar(rules.lark(joined(thoughts, section)))
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
    bodies = [rules.rule(_call(rules, calls, name, schema)) for name, schema in tools.items()]
    head, tail = _marker(rules, frame.call_begin), _marker(rules, frame.call_end)
    inner = rules.rule(" | ".join(bodies))
    call = rules.rule(inner if is_list else joined(head, inner, SPACE, tail))
    separator = '"," ' + SPACE if is_list else SPACE
    several = f"{call} ({separator} {call})*" if is_parallel else call
    if is_list:
        several = joined('"["', SPACE, several, SPACE, '"]"')
    return joined(_marker(rules, frame.section_begin), several, _marker(rules, frame.section_end))


def _marker(rules: LarkRules, text: str) -> str:
    lines = [rules.literal(line.strip()) for line in text.split("\n") if line.strip()]
    opens_name = text.rstrip().endswith(("=", '"', ":", "."))
    return f" {SPACE} ".join(lines) + ("" if opens_name or not lines else f" {SPACE}")


def _call(rules: LarkRules, calls: ObjectCalls | NamedCalls | TaggedCalls, name: str, schema: Schema) -> str:
    match calls:
        case ObjectCalls():
            return _object(rules, calls, name, schema)
        case NamedCalls():
            shown = quoted(f"functions.{name}:") + " /[0-9]{1,3}/" if calls.has_name_in_id else quoted(name)
            call_id = f"({rules.literal(calls.id_begin)} /[a-zA-Z0-9_-]{{1,40}}/)?" if calls.id_begin else ""
            return joined(shown, call_id, _marker(rules, calls.name_end) or SPACE, _json(rules, schema), SPACE)
        case TaggedCalls():
            return _tagged(rules, calls, name, schema)


def _object(rules: LarkRules, calls: ObjectCalls, name: str, schema: Schema) -> str:
    arguments = _json(rules, schema)
    shown = quoted if calls.frame.lines else _json_parts
    if calls.name_is_key:
        return joined(shown("{" + json.dumps(name) + ": "), arguments, '"}"')
    key, given = json.dumps(calls.name_key), json.dumps(calls.arguments_key)
    head = shown(f"{{{key}: {json.dumps(name, ensure_ascii=False)}, {given}: ")
    call_id = f"({shown(f', {json.dumps(calls.id_key)}: ')} {_ID} )?" if calls.id_key else ""
    members = joined(head, arguments, call_id, SPACE, '"}"')
    if calls.wrapper_key:
        return joined(shown(f"{{{json.dumps(calls.wrapper_key)}: "), members, '"}"')
    return members


def _json_parts(text: str) -> str:
    # The terminals are like those that llguidance makes for JSON schemas.
    return joined(*map(quoted, _JSON_PART.findall(text)))


def _tagged(rules: LarkRules, calls: TaggedCalls, name: str, schema: Schema) -> str:
    properties = schema.get("properties")
    required = schema.get("required")
    needed = {key for key in required if isinstance(key, str)} if isinstance(required, list) else set()
    known = properties if isinstance(properties, Mapping) else {}
    ordered = [*(key for key in known if key in needed), *(key for key in known if key not in needed)]
    shared = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    parts = []
    for key in ordered:
        value = {**known[key], **shared} if isinstance(known[key], Mapping) else {}
        argument = rules.rule(_argument(rules, calls, quoted(key), value))
        parts.append(argument if key in needed else f"({argument})?")
    if schema.get("additionalProperties") is not False:
        parts.append(f"({rules.rule(_argument(rules, calls, _ANY_KEY, {}))})*")
    attributes = f'/[^<>"]{{0,20}}"[^<>"]{{0,20}}/ {rules.literal(calls.value_begin)}' if calls.name_end == '"' else ""
    return joined(quoted(name), _marker(rules, calls.name_end) or SPACE, attributes, *parts)


def _argument(rules: LarkRules, calls: TaggedCalls, key: str, schema: Schema) -> str:
    types = types_of(schema)
    is_text = not types or "string" in types
    head = [_marker(rules, calls.argument_begin), key, _marker(rules, calls.key_end.rstrip())]
    if calls.value_begin:
        attribute = quoted(calls.string_attribute) if is_text and types else "/[a-z]{1,12}/"
        head += [attribute, rules.literal(calls.value_begin)]
    values = schema.get("enum")
    if types == STRING and isinstance(values, list) and values:
        choices = " | ".join(quoted(str(value)) for value in values)
        value = f"({choices}) {SPACE} {rules.literal(calls.value_end)}"
    elif is_text:
        value = rules.text_until(calls.value_end)
    else:
        value = f"{_json(rules, schema)} {SPACE} {rules.literal(calls.value_end)}"
    indent = f"{quoted(calls.value_indent)}" if calls.value_indent else ""
    return joined(*head, indent, value, SPACE)


def _channel_call(rules: LarkRules, calls: ChannelCalls, tools: Tools, *, reasons: bool) -> str:
    bodies = []
    for name, schema in tools.items():
        header = rules.literal(calls.call_header.format(name=name) + calls.header_end)
        body = (
            _json(rules, schema)
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


def _json(rules: LarkRules, schema: Schema) -> str:
    return rules.rule(f"%json {json.dumps({**schema, GUIDANCE: _OPTIONS})}")
