"""Builds the grammar of tool calls that are JSON objects, such as {"name": "search", "arguments": {"city": "Rome"}}."""

from __future__ import annotations

import json
from typing import Final

from llamaclust.model.chat.tools.call_sink import Tools
from llamaclust.model.chat.tools.constraint.lark_rules import COMMA, LAYOUT, LarkRules, json_value
from llamaclust.model.chat.tools.tool_format import ObjectCalls
from llamaclust.model.grammars.definitions import quoted

_ID: Final = r'/"[a-zA-Z0-9_-]{1,40}"/'
_MOST_REORDERED: Final = 8
"""The maximum number of tools whose calls may have the arguments before the name. All their schemas are then followed
at once."""


def object_call(rules: LarkRules, calls: ObjectCalls, tools: Tools) -> str:
    arguments = {name: json_value(rules, schema) for name, schema in tools.items()}
    if calls.name_is_key:
        return _braced(" | ".join(rules.rule(_member(name, value)) for name, value in arguments.items()))
    members = rules.rule(_members(rules, calls, {_json_text(name): value for name, value in arguments.items()}))
    if calls.id_key:
        call_id = _member(calls.id_key, _ID)
        members = f"{call_id} {COMMA} {members} | {members} ({COMMA} {call_id})?"
    return _braced(_member(calls.wrapper_key, _braced(members)) if calls.wrapper_key else members)


def _members(rules: LarkRules, calls: ObjectCalls, arguments: dict[str, str]) -> str:
    """Returns the rule for a name and its arguments, in both orders if the tools are few."""
    followed = (f"{name} {COMMA} {_member(calls.arguments_key, value)}" for name, value in arguments.items())
    orders = [_member(calls.name_key, f"({' | '.join(map(rules.rule, followed))})")]
    if len(arguments) <= _MOST_REORDERED:
        preceded = (f"{value} {COMMA} {_member(calls.name_key, name)}" for name, value in arguments.items())
        orders.append(_member(calls.arguments_key, f"({' | '.join(map(rules.rule, preceded))})"))
    return " | ".join(orders)


def _braced(members: str) -> str:
    return f'"{{" {LAYOUT} ({members}) {LAYOUT} "}}"'


def _member(key: str, value: str) -> str:
    return f'{_json_text(key)} {LAYOUT} ":" {LAYOUT} {value}'


def _json_text(text: str) -> str:
    return quoted(json.dumps(text, ensure_ascii=False))
