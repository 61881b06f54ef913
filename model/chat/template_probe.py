"""Renders a chat template with marker texts such as `Zqcontent9`, to learn how it writes reasoning and calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llamaclust.core.errors import RequestError
from llamaclust.model.chat.tools.tool_format import ReasoningTags

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool, Mapping[str, Any]], str]
"""Renders messages with or without a generation prompt, and with a template's variables. May raise RequestError."""

NAMES: Final = ("zqfirsttool", "zqsecondtool")
KEYS: Final = ("zqfirstkey", "zqsecondkey")
VALUES: Final = ("Zqfirstvalue", "Zqsecondvalue")
NUMBER: Final = 70613
CALL_IDS: Final = ("zqcall001", "zqcall002")  # Mistral's templates require nine characters.
OTHER_CALL_ID: Final = "call_zq0123456789abcdef01234567"  # OpenAI's API has ids of this form.
CONTENT: Final = "Zqcontent9"
REASONING: Final = "Zqreasoning8"
RESULT: Final = "Zqresult7"
SYSTEM: Final = "Zqsystem5"
QUESTION: Final = "Zqquestion6"
_USER: Final = {"role": "user", "content": QUESTION}
_CUT_AT_END: Final = re.compile(r"(<[^<>\s]*|\[[A-Z_/]*)$")
_CUT_AT_BEGIN: Final = re.compile(r"^([^<>\s]*>|[A-Z_/]+\])")
_LAST_MARKUP: Final = re.compile(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*$")
_FIRST_MARKUP: Final = re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]]+\])")


@dataclass(frozen=True, slots=True)
class Probe:
    """A chat template under test. If `text_arguments`, the template gets the arguments of calls as JSON text."""

    render: Render
    text_arguments: bool = False
    reasoning: ReasoningTags | None = None

    def text(self, *messages: Message, prompt: bool = False, **variables: Any) -> str:
        try:
            return self.render([_USER, *messages], prompt, {"tools": tools(), "enable_thinking": True, **variables})
        except RequestError:
            return ""

    def with_system(self, text: str) -> str:
        try:
            return self.render([{"role": "system", "content": text}, _USER], True, {"enable_thinking": True})
        except RequestError:
            return ""

    def call_text(self, *arguments: Mapping[str, Any]) -> str:
        """Returns the text that tool calls with these arguments add to a message. Omits empty reasoning tags."""
        text = difference(self.text(call_message(arguments, text_arguments=self.text_arguments)), self.content_text())
        tags = self.reasoning
        if tags is None:
            return text
        return re.sub(rf"^\s*{re.escape(tags.begin)}\s*{re.escape(tags.end)}", "", text)

    def content_text(self) -> str:
        return self.text({"role": "assistant", "content": CONTENT})


def tools() -> list[dict[str, Any]]:
    properties = {key: {"type": "string", "description": "A value."} for key in KEYS}
    schema = {"type": "object", "properties": properties, "required": [KEYS[0]]}
    return [
        {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": schema}}
        for name in NAMES
    ]


def call_message(
    arguments: Sequence[Mapping[str, Any]], *, text_arguments: bool, call_ids: Sequence[str] = CALL_IDS
) -> Message:
    calls = [
        {
            "type": "function",
            "id": call_id,
            "function": {"name": name, "arguments": json.dumps(given) if text_arguments else dict(given)},
        }
        for name, call_id, given in zip(NAMES, call_ids, arguments, strict=False)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def difference(text: str, other: str) -> str:
    before = len(common_begin(text, other))
    behind = common_end(text[before:], other[before:])
    return text[before : len(text) - len(behind)]


def common_begin(text: str, other: str) -> str:
    return _CUT_AT_END.sub("", shared_begin(text, other))


def common_end(text: str, other: str) -> str:
    return _CUT_AT_BEGIN.sub("", shared_end(text, other))


def shared_begin(text: str, other: str) -> str:
    length = next((place for place, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
    return min(text, other, key=len) if length is None else text[:length]


def shared_end(text: str, other: str) -> str:
    return shared_begin(text[::-1], other[::-1])[::-1]


def last_markup(text: str) -> str:
    found = _LAST_MARKUP.search(text)
    return found[1] if found else ""


def first_markup(text: str) -> str:
    found = _FIRST_MARKUP.match(text)
    return found[1] if found else ""
