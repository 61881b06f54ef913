"""Builds a grammar in llguidance's dialect of Lark from rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from llamaclust.model.chat.tools.call_sink import Schema
from llamaclust.model.grammars.definitions import GUIDANCE, JSON_TEXT, quoted

Split = Callable[[str], Sequence[str | int]]
"""A function that splits a text into strings and the ids of control tokens."""

SPACE: Final = r"/[ \n]{0,2}[ \t]{0,20}/"
"""White space between markers. llguidance reads as much of it as possible, so it must not precede a literal or a value
that may begin with white space."""
LAYOUT: Final = f"/({JSON_TEXT['whitespace_pattern']})?/"
"""White space in JSON, as llguidance allows it for schemas."""
COMMA: Final = f'{LAYOUT} "," {LAYOUT}'
_OPTIONS: Final = {**JSON_TEXT, "coerce_one_of": True}
"""Options for schemas. `oneOf` is treated like `anyOf`, as in llama.cpp, because alternatives rarely overlap."""
_BITS: Final = 64
"""The number of bits of a parameter in llguidance. Further members may occur more than once, or not at all."""
_TEXT: Final = "/(?s:.*)/"


@dataclass
class LarkRules:
    split: Split
    rules: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # Rule names by the rules' text.

    def literal(self, text: str) -> str:
        pieces = (quoted(piece) if isinstance(piece, str) else f"<[{piece}]>" for piece in self.split(text) if piece)
        return " ".join(pieces)

    def text_until(self, end: str, text: str = _TEXT) -> str:
        """Returns a rule for the shortest text that ends with `end`. What precedes `end` matches `text`."""
        first, *rest = [piece for piece in self.split(end) if piece != ""]
        if isinstance(first, int):
            return f"{self.rule(text)} {self.literal(end)}"
        parts = "".join(f" {quoted(piece) if isinstance(piece, str) else f'<[{piece}]>'}" for piece in rest)
        return self.rule(text, f"suffix={quoted(first)}") + parts

    def rule(self, body: str, attributes: str = "") -> str:
        return self._named("r", f"{f'[{attributes}]' if attributes else ''}: {body}")

    def terminal(self, expression: str) -> str:
        """Returns a rule for combined regular expressions, such as `/a/ & ~/b/`. Names of such rules are upper-case."""
        return self._named("R", f": {expression}")

    def recursive(self, body: Callable[[str], str]) -> str:
        name = f"n{len(self.rules)}"
        self.rules.append("")
        place = len(self.rules) - 1
        self.rules[place] = f"{name}: {body(name)}"
        return name

    def in_any_order(self, members: Sequence[tuple[str, bool]], separator: str = "", free: str = "") -> str:
        """Returns a rule for rules in any order, each at most once. A member's flag tells whether it must occur. A rule
        `free` may occur any number of times. The rule's parameter has a bit for each member that has occurred."""
        ordered = sorted(members, key=lambda member: not member[1])
        needed = sum(is_needed for _, is_needed in ordered)
        first, behind = f"o{len(self.rules)}", f"o{len(self.rules) + 1}"
        choices = [
            f"{rule} {behind}::set_bit({bit}) %if bit_clear({bit})" for bit, (rule, _) in enumerate(ordered[:_BITS])
        ]
        choices += [f"{rule} {behind}::_" for rule in (*(rule for rule, _ in ordered[_BITS:]), free) if rule]
        has_all = f" %if is_ones([0:{min(needed, _BITS)}])" if needed else ""
        has_more = "" if free or len(ordered) > _BITS else f" %if not(is_ones([0:{len(ordered)}]))"
        self.rules.append(f"{first}::_: {' | '.join(choices)}")
        self.rules.append(f'{behind}::_: ""{has_all} | {joined(separator, first)}::_{has_more}')
        return f"{first}::0" if needed else f"({first}::0)?"

    def lark(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self.rules])

    def _named(self, letter: str, text: str) -> str:
        if text not in self.names:
            self.names[text] = f"{letter}{len(self.rules)}"
            self.rules.append(self.names[text] + text)
        return self.names[text]


def joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def marker(rules: LarkRules, text: str) -> str:
    """Returns the rule for a marker. White space may follow each of its lines, but not the beginning of a name."""
    lines = [rules.literal(line.strip()) for line in text.split("\n") if line.strip()]
    opens_name = text.rstrip().endswith(("=", '"', ":", "."))
    return f" {SPACE} ".join(lines) + ("" if opens_name or not lines else f" {SPACE}")


def json_value(rules: LarkRules, schema: Schema) -> str:
    return rules.rule(f"%json {json.dumps({**schema, GUIDANCE: _OPTIONS})}")
