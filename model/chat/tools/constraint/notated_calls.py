"""Builds the grammar of tool calls in Python's notation, Gemma's notation, or nested elements."""

from __future__ import annotations

from collections.abc import Callable

from llamaclust.model.chat.tools.call_sink import Schema, Tools
from llamaclust.model.chat.tools.constraint.element_values import ElementValues
from llamaclust.model.chat.tools.constraint.inline_values import GemmaValues, PythonArguments
from llamaclust.model.chat.tools.constraint.lark_rules import SPACE, LarkRules, joined
from llamaclust.model.chat.tools.tool_format import NotatedCalls, Notation
from llamaclust.model.grammars.definitions import quoted


def notated_section(rules: LarkRules, calls: NotatedCalls, tools: Tools, *, is_parallel: bool) -> str:
    frame, comma = calls.frame, f'"," {SPACE}'
    begin = joined(*(f"{rules.literal(line)} {SPACE}" for line in frame.section_begin.splitlines() if line))
    end = joined(*(f"{SPACE} {rules.literal(line)}" for line in frame.section_end.splitlines() if line))
    match calls.notation:
        case Notation.PYTHON:
            values = PythonArguments(rules)
            call = _call(rules, tools, "(", lambda schema: f'{values.members(schema)} ")"')
            return joined(begin, '"["', _several(call, comma, is_parallel=is_parallel), '"]"', end)
        case Notation.GEMMA:
            inline = GemmaValues(rules, calls.mark)
            call = _call(rules, tools, "{", lambda schema: f'{inline.members(schema)} "}}"')
            call = rules.rule(joined(rules.literal(frame.call_begin), call, rules.literal(frame.call_end)))
            return joined(begin, _several(call, SPACE, is_parallel=is_parallel), end)
        case Notation.ELEMENTS:
            elements = ElementValues(rules, calls.mark)
            call = _call(rules, tools, '">', lambda schema: elements.arguments(schema, "</invoke>"))
            call = rules.rule(joined(rules.literal(frame.call_begin), call))
            return joined(begin, _several(call, SPACE, is_parallel=is_parallel), end)


def _call(rules: LarkRules, tools: Tools, opening: str, arguments: Callable[[Schema], str]) -> str:
    bodies = [rules.rule(f"{quoted(name + opening)} {arguments(schema)}") for name, schema in tools.items()]
    return rules.rule(" | ".join(bodies))


def _several(call: str, separator: str, *, is_parallel: bool) -> str:
    return f"{call} ({separator} {call})*" if is_parallel else call
