from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from llamaclust.model.chat.tools.events import AnswerEvent, ArgumentText, CallBegun, CallEnded

MAX_NAME_CHARACTERS: Final = 256

Schema = Mapping[str, Any]
Tools = Mapping[str, Schema]


class CallSink:
    """Collects the events of tool calls, and gives each call its number."""

    def __init__(self, tools: Tools, most_calls: int | None) -> None:
        self.tools = tools
        self._most_calls = most_calls
        self._events: list[AnswerEvent] = []
        self._calls = 0
        self._prompt_calls = 0  # Number of calls that are complete in the prompt.
        self.is_open = False
        self._has_arguments = False  # True if the newest call has arguments.
        self.is_cut = False  # True if the answer ended, and not because the model ended it.

    @property
    def calls(self) -> int:
        return self._calls

    def take_events(self) -> list[AnswerEvent]:
        events, self._events = self._events, []
        return events

    def put(self, event: AnswerEvent) -> None:
        self._events.append(event)

    def drop_begun(self) -> None:
        """Drops the events that came from the prompt, but keeps those of an unfinished tool call."""
        of_call = (event for event in self.take_events() if isinstance(event, CallBegun | ArgumentText))
        self._prompt_calls = self._calls
        if self.is_open:
            self._events = [replace(event, index=0) for event in of_call if event.index == self._calls]

    def begin(self, name: str, call_id: str = "") -> None:
        self._put_of_call(CallBegun(self._index, name, call_id))
        self.is_open, self._has_arguments = True, False

    def argument(self, text: str) -> None:
        self._has_arguments |= bool(text)
        self._put_of_call(ArgumentText(self._index, text))

    def end(self, call_id: str = "", *, is_read: bool = True) -> None:
        """Ends the call. A call without arguments gets an empty object if all its text was read (`is_read`)."""
        if is_read and not (self._has_arguments or self.is_cut):
            self.argument("{}")
        self._put_of_call(CallEnded(self._index, call_id, self.is_cut))
        self._calls += 1
        self.is_open = False

    @property
    def _index(self) -> int:
        return self._calls - self._prompt_calls

    def _put_of_call(self, event: AnswerEvent) -> None:
        if self._most_calls is None or self._calls < self._most_calls:
            self._events.append(event)
