"""Answers in the pieces of Ollama's replies: text, reasoning and whole calls, whose arguments are objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.model.chat.tools.argument_values import arguments_object
from llamaclust.model.chat.tools.events import (
    AnswerEvent,
    ArgumentText,
    CallBegun,
    CallEnded,
    ContentText,
    ReasoningText,
    ToolCall,
)


@dataclass(slots=True)
class Piece:
    """What a chunk adds to an answer."""

    content: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.content or self.thinking or self.calls)


class PieceReader:
    """Of one answer, from its first chunk to its last; or of a whole answer, which is its only chunk."""

    def __init__(self) -> None:
        self._open: dict[int, ToolCall] = {}

    def read(self, chunk: TextChunk) -> Piece:
        """A call is part of the piece that completes it."""
        piece = Piece()
        for event in chunk.events or (ContentText(chunk.text),):
            self._take(event, piece)
        if chunk.finish_reason is not None:
            for index in tuple(self._open):
                self._close(index, piece)
        return piece

    def _take(self, event: AnswerEvent, piece: Piece) -> None:
        match event:
            case ReasoningText(text):
                piece.thinking += text
            case ContentText(text):
                piece.content += text
            case CallBegun(index, name, call_id):
                self._open[index] = ToolCall(name, call_id)
            case ArgumentText(index, text):
                self._open[index].arguments += text
            case CallEnded(index, call_id):
                call = self._open[index]
                call.call_id = call_id or call.call_id
                call.arguments = call.arguments or "{}"
                self._close(index, piece)

    def _close(self, index: int, piece: Piece) -> None:
        """What is no complete call, since the answer was cut off, is content: arguments are objects here."""
        call = self._open.pop(index)
        arguments = arguments_object(call.arguments)
        if arguments is None:
            piece.content += f"{call.name}({call.arguments}"
            return
        named = {"id": call.call_id} if call.call_id else {}
        piece.calls.append({**named, "function": {"index": index, "name": call.name, "arguments": arguments}})
