"""Events of a parsed answer, independent of any API's shape, and the message that they make together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """A piece of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    """A piece of the answer that a user reads."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A tool call begins; calls are numbered from 0. `call_id` is empty where the model has written none so far."""

    index: int
    name: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class ArgumentText:
    """A piece of the arguments of call `index`; all pieces together are JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """Call `index` is complete. `call_id` is what the model wrote, also if only behind the arguments."""

    index: int
    call_id: str = ""


AnswerEvent = ReasoningText | ContentText | CallBegun | ArgumentText | CallEnded


@dataclass(slots=True)
class ToolCall:
    """A call as a whole; `arguments` is JSON text as the model wrote it."""

    name: str
    call_id: str = ""
    arguments: str = ""


@dataclass(slots=True)
class ParsedAnswer:
    """An answer as a whole."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, events: Iterable[AnswerEvent]) -> None:
        """Continues the answer."""
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


def merged(events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    """The same events with adjacent pieces of one text joined, and empty ones left out."""
    joined: list[AnswerEvent] = []
    for event in events:
        last = joined[-1] if joined else None
        match event, last:
            case ((ReasoningText("") | ContentText("") | ArgumentText(_, "")), _):
                continue
            case ReasoningText(text), ReasoningText(before):
                joined[-1] = ReasoningText(before + text)
            case ContentText(text), ContentText(before):
                joined[-1] = ContentText(before + text)
            case ArgumentText(index, text), ArgumentText(same, before) if index == same:
                joined[-1] = ArgumentText(index, before + text)
            case _:
                joined.append(event)
    return joined
