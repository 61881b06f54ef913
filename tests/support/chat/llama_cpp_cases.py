"""Reads the cases of llama.cpp's `tests/test-chat.cpp`: answers of models and the expected messages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?:R"(?P<delimiter>[^(\s"]*)\((?P<raw>.*?)\)(?P=delimiter)"
    |"(?P<text>(?:\\.|[^"\\])*)"
    |(?P<word>[A-Za-z_][\w:]*)
    |(?P<number>-?\d+)
    |(?P<sign>[(){},+.;]))""",
    re.DOTALL | re.VERBOSE,
)
_CHAIN = re.compile(r"\b(tst2?)\s*\.\s*test\s*\(")
_TESTER = re.compile(r'(\w+) = peg_tester\(\s*("[^"]*"|\w+)')
_LOOP = re.compile(r"for \((?:const auto & |const char \* )(\w+) :\s*\{([^}]*)\}")
_TOOL = re.compile(r"static common_chat_tool (\w+)\s*(?=\{)")
_FIELD = re.compile(r"\b(\w+)\.(role|content)\s*=(?=\s*\")")
_CONSTANT = re.compile(
    r"(?:const common_chat_msg|common_chat_msg|const std::string|const char \*|auto)\s+(\w+)\s*=(?= *\n? *[\w\"])"
)


@dataclass
class Message:
    """A message with the fields of llama.cpp's."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, str]] = field(default_factory=list)  # name, arguments, id
    role: str = "assistant"


@dataclass
class Case:
    """A test case of the parser: the model's text and the expected message."""

    template: str
    line: int
    text: str = ""
    expected: Message = field(default_factory=Message)
    options: dict[str, Any] = field(default_factory=dict)


def read_cases(source: Path) -> list[Case]:
    """Returns all cases of `test-chat.cpp`; raises ValueError for unknown syntax."""
    text = _without_comments(source.read_text(encoding="utf-8"))
    names = _Names()
    for found in _TOOL.finditer(text):
        names.values[found[1]] = _tool(_Reader(text, found.end(), names).value())
    cases: list[Case] = []
    testers: dict[str, list[str]] = {}
    loops: dict[str, list[str]] = {}
    for kind, found in _statements(text):
        if kind == "loop":
            loops[found[1]] = re.findall(r'"([^"]*)"', found[2])
        elif kind == "tester":
            quoted = found[2].startswith('"')
            testers[found[1]] = [found[2].strip('"')] if quoted else [f"${found[2]}"]
        elif kind == "field":
            message = names.values.setdefault(found[1], Message())
            if isinstance(message, Message):
                setattr(message, found[2], _Reader(text, found.end(), names).expression())
        elif kind == "constant":
            names.define(found[1], text, found.end())
        else:
            cases += _chain(text, found, testers, names)
    return list(_with_templates(cases, loops))


def _statements(text: str) -> list[tuple[str, re.Match[str]]]:
    kinds = (("loop", _LOOP), ("tester", _TESTER), ("constant", _CONSTANT), ("field", _FIELD), ("chain", _CHAIN))
    found = [(kind, match) for kind, pattern in kinds for match in pattern.finditer(text)]
    return sorted(found, key=lambda pair: pair[1].start())


def _with_templates(cases: list[Case], loops: dict[str, list[str]]) -> Iterator[Case]:
    """Yields each case of a function or loop over templates once per template."""
    for case in cases:
        name = {"$template_path": "tmpl"}.get(case.template, case.template.removeprefix("$"))
        for template in loops[name] if case.template.startswith("$") else [case.template]:
            yield Case(Path(template).name, case.line, case.text, case.expected, case.options)


def _chain(text: str, found: re.Match[str], testers: dict[str, list[str]], names: _Names) -> list[Case]:
    reader = _Reader(text, found.end() - 1, names)
    line = text.count("\n", 0, found.start()) + 1
    case = Case(testers[found[1]][0], line, reader.arguments()[0])
    while (method := reader.method()) != "run":
        values = reader.arguments()
        if method == "expect":
            case.expected = values[0]
        elif method == "expect_content":
            case.expected.content = values[0]
        elif method == "expect_reasoning":
            case.expected.reasoning = values[0]
        elif method == "expect_tool_calls":
            case.expected.calls = [(name, arguments, call_id or "") for name, arguments, call_id in values[0]]
        elif method == "tools":
            case.options["tools"] = [_tool(tool) if isinstance(tool, list) else tool for tool in values[0]]
        else:
            case.options[method] = values[0] if values else True
    return [case]


def _tool(fields: list[str]) -> dict[str, Any]:
    name, description, parameters = fields
    schema = json.loads(parameters or "{}") or {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


class _Names:
    """The values of identifiers: constants, tools and the functions that make messages."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {
            "true": True,
            "false": False,
            "message_user": Message("Hey there!", role="user"),
        }
        self._functions: dict[str, Callable[..., Message]] = {
            "simple_assist_msg": _simple,
            "message_with_tool_calls": lambda name, arguments: _simple("", "", name, arguments),
            "message_with_tool_calls_and_reasoning": lambda name, arguments, why: _simple("", why, name, arguments),
            "message_with_reasoning_and_tool_call": lambda why, name, arguments: _simple("", why, name, arguments),
            "message_with_content_and_tool_call": lambda text, name, arguments: _simple(text, "", name, arguments),
            "message_with_reasoning_content_and_multiple_tool_calls": lambda why, text, calls: Message(
                text, why, [(name, arguments, "") for name, arguments in calls]
            ),
        }

    def define(self, name: str, text: str, start: int) -> None:
        """Defines a constant if its expression has a form that cases use."""
        try:
            self.values[name] = _Reader(text, start, self).expression()
        except (KeyError, ValueError, TypeError):
            return

    def call(self, name: str, arguments: list[Any]) -> Any:
        return self._functions[name](*arguments)


def _simple(text: str, why: str = "", name: str = "", arguments: str = "", call_id: str = "") -> Message:
    return Message(text, why, [(name, arguments, call_id)] if name or call_id else [])


class _Reader:
    """Evaluates C++ expressions made of texts, lists, names and calls."""

    def __init__(self, text: str, at: int, names: _Names) -> None:
        self._text = text
        self._at = at
        self._names = names

    def method(self) -> str:
        """Reads the name after the next dot."""
        self._expect(".")
        name = self._next()["word"]
        return str(name)

    def arguments(self) -> list[Any]:
        """Reads values in parentheses."""
        self._expect("(")
        return self._list(")")

    def expression(self) -> Any:
        value = self.value()
        while self._peek()["sign"] == "+":
            self._next()
            value += self.value()
        return value

    def value(self) -> Any:
        token = self._next()
        if token["text"] is not None or token["raw"] is not None:
            return self._texts(token)
        if token["sign"] == "{":
            return self._list("}")
        if token["number"] is not None:
            return int(token["number"])
        word = token["word"]
        if word is None:
            raise ValueError(f"unexpected {token[0]!r}")
        if self._peek()["sign"] == "(":
            return self._names.call(word, self.arguments())
        if word.startswith("COMMON_"):
            return word
        return _copied(self._names.values[word])

    def _texts(self, token: re.Match[str]) -> str:
        """Joins adjacent string literals."""
        text = token["raw"] if token["raw"] is not None else _unescaped(token["text"])
        while self._peek()["text"] is not None or self._peek()["raw"] is not None:
            token = self._next()
            text += token["raw"] if token["raw"] is not None else _unescaped(token["text"])
        return text

    def _list(self, end: str) -> list[Any]:
        values = []
        while self._peek()["sign"] != end:
            if self._peek()["sign"] == ",":
                self._next()
            else:
                values.append(self.expression())
        self._next()
        return values

    def _peek(self) -> re.Match[str]:
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            raise ValueError(f"unexpected {self._text[self._at : self._at + 20]!r}")
        return found

    def _next(self) -> re.Match[str]:
        found = self._peek()
        self._at = found.end()
        return found

    def _expect(self, sign: str) -> None:
        if self._next()["sign"] != sign:
            raise ValueError(f"no {sign!r} at {self._text[self._at - 20 : self._at]!r}")


def _copied(value: Any) -> Any:
    if isinstance(value, Message):
        return Message(value.content, value.reasoning, list(value.calls), value.role)
    return value


def _unescaped(text: str) -> str:
    escapes = {"n": "\n", "t": "\t", "r": "\r", "0": "\0"}
    return re.sub(r"\\(.)", lambda found: escapes.get(found[1], found[1]), text, flags=re.DOTALL)


def _without_comments(text: str) -> str:
    """Removes comments, but keeps line breaks and slashes within texts."""
    kept = re.compile(r'(R"([^(\s"]*)\(.*?\)\2"|"(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
    return kept.sub(lambda found: found[1] or "\n" * found[0].count("\n"), text)
