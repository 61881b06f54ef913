"""Builds the grammar of tool calls with tags around each argument, such as <parameter=city>Rome</parameter>."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from llamaclust.model.chat.tools.argument_values import STRING, type_name, types_of
from llamaclust.model.chat.tools.call_sink import Schema
from llamaclust.model.chat.tools.constraint.inline_values import PythonValues
from llamaclust.model.chat.tools.constraint.lark_rules import SPACE, LarkRules, joined, json_value, marker
from llamaclust.model.chat.tools.tool_format import CDATA_BEGIN, CDATA_END, TaggedCalls
from llamaclust.model.grammars.definitions import quoted

_ANY_KEY: Final = re.compile(r'[^<>"=\s]{1,64}')
_ANY_TYPE: Final = "/[a-z]{1,12}/"
_PYTHON_WORDS: Final = (True, False, None)
_IN_CDATA: Final = f"/{re.escape(CDATA_BEGIN)}(?s:.*)/"
_NO_CDATA: Final = f"/(?s:.*)/ & ~{_IN_CDATA}"


def tagged_call(rules: LarkRules, calls: TaggedCalls, name: str, schema: Schema) -> str:
    attributes = f'/[^<>"]{{0,20}}"[^<>"]{{0,20}}/ {rules.literal(calls.value_begin)}' if calls.name_end == '"' else ""
    return joined(quoted(name), marker(rules, calls.name_end) or SPACE, attributes, _arguments(rules, calls, schema))


def _arguments(rules: LarkRules, calls: TaggedCalls, schema: Schema) -> str:
    properties, required = schema.get("properties"), schema.get("required")
    known = properties if isinstance(properties, Mapping) else {}
    shared = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    members = []
    for key, part in known.items():
        value = {**part, **shared} if isinstance(part, Mapping) else {}
        argument = rules.rule(_argument(rules, calls, quoted(key), value))
        members.append((argument, isinstance(required, list) and key in required))
    if schema.get("additionalProperties") is False:
        return rules.in_any_order(members) if members else ""
    free = rules.rule(_argument(rules, calls, rules.terminal(_other_key(known)), {}))
    return rules.in_any_order(members, free=free)


def _other_key(known: Iterable[str]) -> str:
    """Returns the rule for any key that is not in `known`."""
    excluded = "|".join(re.escape(key).replace("/", r"\/") for key in known if _ANY_KEY.fullmatch(key))
    return f"/{_ANY_KEY.pattern}/" + (f" & ~/{excluded}/" if excluded else "")


def _argument(rules: LarkRules, calls: TaggedCalls, key: str, schema: Schema) -> str:
    types = types_of(schema)
    text = _text(rules, calls, schema, types) if not types or "string" in types else ""
    other = _other(rules, calls, schema, types) if types != STRING else ""
    if calls.value_begin:
        begin = rules.literal(calls.value_begin)
        text = text and joined(quoted(calls.string_attribute), begin, text)
        other = other and joined(_ANY_TYPE, begin, other)
    elif text:
        other = ""  # A text may be anything, even JSON.
    value = " | ".join(filter(None, (text, other)))
    return joined(marker(rules, calls.argument_begin), key, _key_end(rules, calls), f"({value})", SPACE)


def _key_end(rules: LarkRules, calls: TaggedCalls) -> str:
    """Returns the marker after a key, without white space behind it, which may belong to the value."""
    lines = [line.strip() for line in calls.key_end.splitlines() if line.strip()]
    return f" {SPACE} ".join(map(rules.literal, lines))


def _text(rules: LarkRules, calls: TaggedCalls, schema: Schema, types: frozenset[str]) -> str:
    """Returns the rule for a text and the tag after it. The text includes `value_indent` and `value_dedent`."""
    choices = _constants(schema)
    if types == STRING and choices:
        shown = (quoted(f"{calls.value_indent}{choice}{calls.value_dedent}") for choice in choices)
        return f"({' | '.join(shown)}) {rules.literal(calls.value_end)}"
    if not calls.has_cdata:
        return rules.text_until(calls.value_end)
    ends = (rules.text_until(CDATA_END + calls.value_end, _IN_CDATA), rules.text_until(calls.value_end, _NO_CDATA))
    return f"({' | '.join(ends)})"


def _other(rules: LarkRules, calls: TaggedCalls, schema: Schema, types: frozenset[str]) -> str:
    """Returns the rule for JSON and the tag after it. Some templates write Python's words or whole values."""
    bare = [value for value in _constants(schema) or _PYTHON_WORDS if isinstance(value, bool) or value is None]
    words = [quoted(repr(value)) for value in bare if type_name(value) in types]
    inline = [PythonValues(rules).value(schema)] if calls.has_python_values and types & {"array", "object"} else []
    values = f"({' | '.join((json_value(rules, schema), *words, *inline))})"
    return f"{SPACE} {values} {SPACE} {rules.literal(calls.value_end)}"


def _constants(schema: Schema) -> Sequence[Any]:
    values = schema.get("enum", [schema["const"]] if "const" in schema else ())
    return values if isinstance(values, list) else ()
