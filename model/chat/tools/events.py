"""The events of a parsed answer, which are the same for all APIs, and the message that they form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Final


@dataclass(frozen=True, slots=True)
class ReasoningText:
    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The beginning of tool call number `index`, counted from 0. `call_id` is empty until the model writes an id."""

    index: int
    name: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class ArgumentText:
    """A piece of the arguments of tool call number `index`. All pieces of a call together are JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The end of tool call number `index`. `call_id` is the id that the model wrote, or empty if it wrote none."""

    index: int
    call_id: str = ""
    is_cut: bool = False  # True if a stop string or a token limit ended the answer within the call.


AnswerEvent = ReasoningText | ContentText | CallBegun | ArgumentText | CallEnded


@dataclass(slots=True)
class ToolCall:
    name: str
    call_id: str = ""
    arguments: str = ""


@dataclass(slots=True)
class ParsedAnswer:
    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, events: Iterable[AnswerEvent]) -> None:
        for event in events:
            match event:
                case ReasoningText(text):
                    self.reasoning += text
                case ContentText(text):
                    self.content += text
                case CallBegun(_, name, call_id):
                    self.calls.append(ToolCall(name, call_id))
                case ArgumentText(index, text):
                    self.calls[index].arguments += text
                case CallEnded(index, call_id):
                    self.calls[index].call_id = call_id or self.calls[index].call_id


_TEXTS: Final = (ReasoningText, ContentText, ArgumentText)


def _kind_of_text(event: AnswerEvent) -> tuple[type[AnswerEvent], int]:
    return type(event), event.index if isinstance(event, ArgumentText) else 0


def merged(events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    joined: list[AnswerEvent] = []
    for _, group in groupby((event for event in events if not isinstance(event, _TEXTS) or event.text), _kind_of_text):
        same = list(group)
        first = same[0]
        if isinstance(first, _TEXTS):
            joined.append(replace(first, text="".join(event.text for event in same if isinstance(event, _TEXTS))))
        else:
            joined += same
    return joined
