"""Builds grammar rules for argument values in XML-like elements. Objects and lists are nested elements."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from llamaclust.model.chat.tools.call_sink import Schema
from llamaclust.model.chat.tools.constraint.lark_rules import LarkRules, joined
from llamaclust.model.chat.tools.constraint.schema_parts import alternatives, constants, kinds, number, properties
from llamaclust.model.grammars.definitions import quoted

_ANY_TEXT: Final = "/(?s:.*)/"
_ANY_BEGIN: Final = r"/<[^\/<>\s][^<>]{0,63}>/"
_ANY_END: Final = r"/<\/[^<>]{1,64}>/"
_TAG: Final = re.compile(r"[^/<>\s][^<>]*")


class _FreeValue(Exception):
    """Signals that a schema allows any value, even text that contains the closing tag of the value's own element."""


class ElementValues:
    """Builds grammar rules for arguments in elements such as <city>Rome</city>. The text `mark` precedes each tag."""

    def __init__(self, rules: LarkRules, mark: str) -> None:
        self._rules = rules
        self._mark = mark

    def arguments(self, schema: Schema, closing: str) -> str:
        try:
            return joined(self._members(schema, 0), self._literal(closing))
        except _FreeValue:
            return self._free(closing)

    def _free(self, closing: str) -> str:
        """Returns a rule for any text and elements before `closing`. A text cannot contain a mark that is a token."""
        mark = self._rules.literal(self._mark)
        if not mark.startswith("<["):
            return self._text(closing)
        content = self._rules.recursive(
            lambda name: f"{_ANY_TEXT} ({mark} {_ANY_BEGIN} {name} {mark} {_ANY_END} {_ANY_TEXT})*"
        )
        return f"{content} {self._literal(closing)}"

    def _members(self, schema: Schema, depth: int) -> str:
        found = properties(schema)
        if found is None or not all(_TAG.fullmatch(key) for key, _, _ in found):
            raise _FreeValue
        elements = [(self._element(key, part, depth), is_needed) for key, part, is_needed in found]
        return self._rules.in_any_order(elements) if elements else ""

    def _element(self, tag: str, schema: Any, depth: int) -> str:
        return self._rules.rule(joined(self._literal(f"<{tag}>"), self._value(schema, f"</{tag}>", depth + 1)))

    def _value(self, schema: Any, closing: str, depth: int) -> str:
        types, end = kinds(schema, depth), self._literal(closing)
        if not types:
            raise _FreeValue
        texts = [value if isinstance(value, str) else json.dumps(value) for value in constants(schema)]
        if texts and all(texts):
            return f"({' | '.join(map(quoted, texts))}) {end}"
        if "string" in types:
            return self._text(closing)
        if parts := alternatives(schema):
            return f"({' | '.join(self._value(part, closing, depth + 1) for part in parts)})"
        return f"({' | '.join(self._of_kind(kind, schema, depth) for kind in types)}) {end}"

    def _of_kind(self, kind: str, schema: Schema, depth: int) -> str:
        match kind:
            case "array":
                return f"({self._element('item', schema.get('items'), depth)})*"
            case "object":
                return f"({self._members(schema, depth)})"
            case "integer" | "number":
                return self._rules.rule(number(kind, schema))
            case "boolean":
                return '"true" | "false"'
            case _:
                return '"null"'

    def _text(self, closing: str) -> str:
        return self._rules.text_until(self._mark + closing)

    def _literal(self, tag: str) -> str:
        return self._rules.literal(self._mark + tag)
