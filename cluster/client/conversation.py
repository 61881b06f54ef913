"""The messages of a chat by turns: what is sent, what an answer adds, and their file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from os import PathLike
from pathlib import Path
from typing import Any, Self

from llamaclust.cluster.client.types import Message, Options
from llamaclust.cluster.config.values import expand_home
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.regular_file import read_json, write_text

_SYSTEM_ROLES = frozenset({"system", "developer"})
_ROLES = frozenset({*_SYSTEM_ROLES, "user", "assistant", "tool"})


class Conversation:
    """Messages in OpenAI's form, which may be changed between answers. A turn is a user's message with all behind it to
    the next one.

    With `drop_oldest`, a conversation longer than the model's context goes on without its oldest turns: they stay among
    `messages`, but are not sent; otherwise the server's RequestError is raised.
    """

    def __init__(self, system: str | None, options: Options, *, drop_oldest: bool) -> None:
        self.messages: list[dict[str, Any]] = []
        self.options = options
        self.dropped_messages = 0  # behind the system message, which are not sent
        self._drops_oldest = drop_oldest
        self._is_answering = False
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """Replaces the system message; None: there is none."""
        self.messages[: self._first_turn()] = [] if text is None else [{"role": "system", "content": text}]

    def undo(self) -> list[dict[str, Any]]:
        """Removes the last turn; its messages. UsageError where there is none."""
        start = self._last_turn()
        turn, self.messages[start:] = self.messages[start:], []
        self.dropped_messages = 0
        return turn

    def clear(self) -> None:
        """Removes all messages but the system message."""
        del self.messages[self._first_turn() :]
        self.dropped_messages = 0

    def branch(self) -> Self:
        """Another one with the same messages, options and client; what is sent to one leaves the other as it is."""
        other = copy(self)
        other.messages, other.options = deepcopy(self.messages), deepcopy(self.options)
        other._is_answering = False
        return other

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the messages to a file that its owner alone may read, as a whole or not at all. UsageError."""
        place = _place(path)
        try:
            if place.exists() and not place.is_file():
                raise UsageError(f"{path}: cannot save: it is not a file")
            write_text(place, json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"{path}: cannot save: {error.strerror}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{path}: cannot save: a message is no JSON: {error}") from error

    def load(self, path: str | PathLike[str]) -> None:
        """Replaces all messages by those of a file that `save` wrote. UsageError, with the messages as they were."""
        try:
            messages = _checked(read_json(_place(path)))
        except OSError as error:
            raise UsageError(f"{path}: cannot load: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: not a conversation that was saved: {error}") from error
        self.messages, self.dropped_messages = messages, 0

    def _last_turn(self) -> int:
        """The place of the last message of role `user`. UsageError where there is none."""
        for at in range(len(self.messages) - 1, -1, -1):
            if self.messages[at]["role"] == "user":
                return at
        raise UsageError("the conversation has no message of the user yet")

    @contextmanager
    def _turn(self, message: Message | None) -> Iterator[Turn]:
        """A turn to be answered: one more, or with None the last one again. UsageError while another one is answered.

        Afterwards the conversation has the answer as far as it came; without any text of it, it is as before.
        """
        if self._is_answering:
            raise UsageError("this session is still answering: read its stream to the end, or close it")
        start = self._last_turn() if message is None else len(self.messages)
        turn = Turn(self, start, self.messages[start] if message is None else dict(message))
        dropped_before = self.dropped_messages
        self._is_answering = True
        try:
            yield turn
        finally:
            self._is_answering = False
            if turn.has_answer:
                self.messages[start:] = [turn.message, turn.answer()]
            else:
                self.dropped_messages = dropped_before

    def _shorten(self, end: int, error: LlamaclustError) -> bool:
        """Whether another of the turns before `end` is dropped because of the error."""
        begin = self._first_turn() + self.dropped_messages
        if not self._drops_oldest or error.code != "context_length_exceeded" or begin >= end:
            return False
        following = (at for at in range(begin + 1, end) if self.messages[at]["role"] == "user")
        self.dropped_messages += next(following, end) - begin
        return True

    def _before(self, end: int) -> list[Message]:
        """The messages before `end` that are sent."""
        first = self._first_turn()
        return [*self.messages[:first], *self.messages[first + self.dropped_messages : end]]

    def _first_turn(self) -> int:
        others = (at for at, message in enumerate(self.messages) if message["role"] not in _SYSTEM_ROLES)
        return next(others, len(self.messages))


class Turn:
    """A user's message while it is answered."""

    def __init__(self, conversation: Conversation, start: int, message: dict[str, Any]) -> None:
        self.message = message
        self._conversation = conversation
        self._start = start
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._is_finished = False

    @property
    def messages(self) -> list[Message]:
        """What is sent."""
        return [*self._conversation._before(self._start), self.message]

    @property
    def has_answer(self) -> bool:
        """Also one without text, where the model ended it."""
        return self._is_finished or bool(self._text)

    def take(self, chunk: TextChunk) -> None:
        """Adds a part of the answer."""
        self._text += [chunk.text] if chunk.text else []
        self._reasoning += [chunk.reasoning] if chunk.reasoning else []
        self._is_finished = chunk.finish_reason is not None

    def shorten(self, error: LlamaclustError) -> bool:
        """Whether the messages are fewer now and worth another try."""
        return not self._text and self._conversation._shorten(self._start, error)

    def answer(self) -> dict[str, Any]:
        """The assistant's message, as far as it came. The chat template decides what of its reasoning is sent again."""
        reasoning = {"reasoning_content": "".join(self._reasoning)} if self._reasoning else {}
        return {"role": "assistant", "content": "".join(self._text), **reasoning}


def is_conversation(path: Path) -> bool:
    """Whether `save` wrote this file."""
    try:
        _checked(read_json(path))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _place(path: str | PathLike[str]) -> Path:
    """A link is followed: what it leads to is replaced. UsageError for what no file can have as its path."""
    try:
        return Path(os.path.realpath(expand_home(os.fspath(path))))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _checked(saved: Any) -> list[dict[str, Any]]:
    """ValueError, KeyError or TypeError for what are no messages."""
    messages = saved["messages"]
    if not isinstance(messages, list):
        raise TypeError("messages is not a list")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise ValueError(f"message {number} has none of the roles {', '.join(sorted(_ROLES))}")
        if not isinstance(message.get("content"), str | list | None):
            raise ValueError(f"the content of message {number} is not text")
    json.dumps(messages, ensure_ascii=False).encode()  # ValueError for lone surrogates
    return messages
