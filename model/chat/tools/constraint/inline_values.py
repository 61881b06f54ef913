"""Builds grammar rules for argument values in Python's or Gemma's notation."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from typing import Any, Final

from llamaclust.model.chat.tools.call_sink import Schema
from llamaclust.model.chat.tools.constraint.lark_rules import SPACE, LarkRules, joined
from llamaclust.model.chat.tools.constraint.schema_parts import alternatives, constants, kinds, number, properties
from llamaclust.model.grammars.definitions import quoted

_WORD: Final = re.compile(r"\w+")
_GEMMA_KEY: Final = re.compile(r'[^\s{}\[\],:"<>]+')
_COMMA: Final = f'"," {SPACE}'


class InlineValues(ABC):
    def __init__(self, rules: LarkRules) -> None:
        self.rules = rules
        self._any = ""

    @property
    @abstractmethod
    def text(self) -> str: ...

    @property
    @abstractmethod
    def any_key(self) -> str:
        """The grammar rule for any object key and the separator after it."""

    @abstractmethod
    def key(self, key: str) -> str:
        """Returns the grammar rule for a key and the separator after it, or "" if the notation cannot write the key."""

    @abstractmethod
    def constant(self, value: Any) -> str:
        """Returns the grammar rule for a string, a number, a Boolean or null."""

    def any_value(self) -> str:
        if not self._any:
            self._any = self.rules.recursive(self._any_of)
        return self._any

    def value(self, schema: Any, depth: int = 0) -> str:
        types = kinds(schema, depth)
        if not types:
            return self.any_value()
        if values := constants(schema):
            return f"({' | '.join(map(self.constant, values))})"
        if parts := alternatives(schema):
            return f"({' | '.join(self.value(part, depth + 1) for part in parts)})"
        return f"({' | '.join(self._of_kind(kind, schema, depth) for kind in types)})"

    def members(self, schema: Schema, depth: int = 0) -> str:
        found = properties(schema)
        if found is None or not all(self.key(key) for key, _, _ in found):
            pair = self.rules.rule(joined(self.any_key, self.any_value()))
            return f"({pair} ({_COMMA} {pair})*)?"
        bodies = (joined(self.key(key), self.value(part, depth + 1)) for key, part, _ in found)
        members = [(self.rules.rule(body), entry[2]) for body, entry in zip(bodies, found, strict=True)]
        return self.rules.in_any_order(members, _COMMA) if members else ""

    def _of_kind(self, kind: str, schema: Schema, depth: int) -> str:
        match kind:
            case "string":
                return self.text
            case "integer" | "number":
                return self.rules.rule(number(kind, schema))
            case "boolean":
                return f"{self.constant(True)} | {self.constant(False)}"
            case "null":
                return self.constant(None)
            case "array":
                return _list_of(self.rules.rule(self.value(schema.get("items"), depth + 1)))
            case "object":
                return _object_of(self.members(schema, depth))
            case _:
                return self.any_value()

    def _any_of(self, name: str) -> str:
        pair = self.rules.rule(joined(self.any_key, name))
        words = " | ".join(map(self.constant, (True, False, None)))
        whole_number = self.rules.rule(number("number", {}))
        members = _object_of(f"({pair} ({_COMMA} {pair})*)?")
        return f"{self.text} | {whole_number} | {words} | {_list_of(name)} | {members}"


class PythonValues(InlineValues):
    """Values in Python's notation: "text", 'text', 1, True, None, ["text"], {"key": 1}, or JSON's true, false, null."""

    @property
    def text(self) -> str:
        return r"""(/"([^"\\]|\\(?s:.))*"/ | /'([^'\\]|\\(?s:.))*'/)"""

    @property
    def any_key(self) -> str:
        return f'{self.text} {SPACE} ":" {SPACE}'

    def key(self, key: str) -> str:
        return f'{self.constant(key)} ":" {SPACE}'

    def constant(self, value: Any) -> str:
        forms = dict.fromkeys((json.dumps(value, ensure_ascii=False), repr(value)))
        return f"({' | '.join(map(quoted, forms))})"


class PythonArguments(PythonValues):
    def __init__(self, rules: LarkRules) -> None:
        super().__init__(rules)
        self._values = PythonValues(rules)

    @property
    def any_key(self) -> str:
        return f'/\\w+/ "=" {SPACE}'

    def key(self, key: str) -> str:
        return quoted(f"{key}=") if _WORD.fullmatch(key) else ""

    def any_value(self) -> str:
        return self._values.any_value()

    def value(self, schema: Any, depth: int = 0) -> str:
        return self._values.value(schema, depth)


class GemmaValues(InlineValues):
    """Values in Gemma's notation: <|"|>text<|"|>, 1, true, null, [1,2], {key:1}."""

    def __init__(self, rules: LarkRules, mark: str) -> None:
        super().__init__(rules)
        self._mark = mark

    @property
    def text(self) -> str:
        return joined(self.rules.literal(self._mark), self.rules.text_until(self._mark))

    @property
    def any_key(self) -> str:
        return f'/[^\\s{{}}\\[\\],:"<>]+/ ":" {SPACE}'

    def key(self, key: str) -> str:
        return f"{quoted(f'{key}:')} {SPACE}" if _GEMMA_KEY.fullmatch(key) else ""

    def constant(self, value: Any) -> str:
        if isinstance(value, str):
            return self.rules.literal(f"{self._mark}{value}{self._mark}")
        forms = dict.fromkeys((json.dumps(value), repr(value)))  # The template writes null as None.
        return f"({' | '.join(map(quoted, forms))})"


def _list_of(item: str) -> str:
    return f'"[" {SPACE} ({item} ({_COMMA} {item})*)? {SPACE} "]"'


def _object_of(members: str) -> str:
    return joined('"{"', members, '"}"')
