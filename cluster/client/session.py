"""Chat sessions. A session has a conversation and a client that answers it. It can be saved to a file."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from copy import copy, deepcopy
from os import PathLike
from pathlib import Path
from typing import Any, Generic, Literal, Self, Unpack, overload

from llamaclust.cluster.client.base import AsyncChunkStream, ChunkStream, StreamT, TextCalls, WholeT
from llamaclust.cluster.client.http_codec import CHAT, Content, Message, Options, chat_body
from llamaclust.cluster.client.message_images import has_images, message_json, with_latest_images
from llamaclust.cluster.config.values import expand_home
from llamaclust.cluster.front.text.answer import Answer, TextChunk
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.limits import MAX_BODY_BYTES
from llamaclust.core.regular_file import read_json, write_text

_SYSTEM_ROLES = frozenset({"system", "developer"})
_ROLES = frozenset({*_SYSTEM_ROLES, "user", "assistant", "tool"})
_MOST_BYTES = 256 << 20  # Images are in the messages.


class Session(Generic[WholeT, StreamT]):
    """A conversation with a model. `messages` are in OpenAI's form and may be changed between answers. `options` are
    those of `Client.chat` and apply to every answer. Answers raise RequestError if the conversation exceeds the
    context, and UsageError if its images do not fit into a request. With `drop_oldest`, requests leave out the oldest
    turns or images instead. Only one thread at a time may use a session."""

    def __init__(
        self,
        client: TextCalls[WholeT, StreamT],
        system: str | None = None,
        *,
        drop_oldest: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self.options = options
        self.dropped_messages = 0  # Number of messages after the system message that are no longer sent.
        self.dropped_images = 0  # Number of images that were left out of the last request.
        self._client = client
        self._drops_oldest = drop_oldest
        self._is_answering = False
        self.set_system(system)

    @overload
    def send(self, content: Content, *, stream: Literal[False] = False, **options: Unpack[Options]) -> WholeT: ...
    @overload
    def send(self, content: Content, *, stream: Literal[True], **options: Unpack[Options]) -> StreamT: ...
    def send(self, content: Content, *, stream: bool = False, **options: Unpack[Options]) -> WholeT | StreamT:
        """Answers a user's message. `options` apply only to this answer. At the end, adds the message and the answer to
        the conversation, unless the answer was cut off before any text. Raises UsageError if an image is unusable."""
        message = message_json({"role": "user", "content": content})
        return self._client.deliver(self._answer(message, options), stream=stream)

    @overload
    def regenerate(self, *, stream: Literal[False] = False, **options: Unpack[Options]) -> WholeT: ...
    @overload
    def regenerate(self, *, stream: Literal[True], **options: Unpack[Options]) -> StreamT: ...
    def regenerate(self, *, stream: bool = False, **options: Unpack[Options]) -> WholeT | StreamT:
        """Answers the user's last message again, and replaces the current answer. Raises UsageError if there is no
        user message. The same `seed` gives the same answer, so pass a different seed or none."""
        self._last_turn()
        return self._client.deliver(self._answer(None, options), stream=stream)

    def set_system(self, text: str | None) -> None:
        self.messages[: self._first_turn()] = [] if text is None else [{"role": "system", "content": text}]

    def undo(self) -> list[dict[str, Any]]:
        start = self._last_turn()
        turn, self.messages[start:] = self.messages[start:], []
        self.dropped_messages = 0
        return turn

    def clear(self) -> None:
        del self.messages[self._first_turn() :]
        self.dropped_messages = 0

    def branch(self) -> Self:
        """Returns a session with the same client, and with copies of the messages and options."""
        other = copy(self)
        other.messages, other.options = deepcopy(self.messages), deepcopy(self.options)
        other._is_answering = False
        return other

    def save(self, path: str | PathLike[str]) -> None:
        """Saves the messages to a file that only its owner may read. After a UsageError, the file is unchanged."""
        place = _place(path)
        try:
            if place.exists() and not place.is_file():
                raise UsageError(f"{path}: cannot save: the path is not a file")
            write_text(place, json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"{path}: cannot save: {error.strerror}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{path}: cannot save: a message cannot be written as JSON: {error}") from error

    def load(self, path: str | PathLike[str]) -> None:
        """Replaces the messages by those in a file from `save`. After a UsageError, the old messages are kept."""
        try:
            messages = _read(_place(path))
        except OSError as error:
            raise UsageError(f"{path}: cannot load: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: not a saved conversation: {error}") from error
        self.messages, self.dropped_messages = messages, 0

    async def _answer(self, message: Message | None, options: Options) -> AsyncGenerator[TextChunk, None]:
        """Answers `message`, or the user's last message again if `message` is None."""
        if self._is_answering:
            raise UsageError("this session is still answering: read its stream to the end, or close it")
        start = self._last_turn() if message is None else len(self.messages)
        question = self.messages[start] if message is None else dict(message)
        merged: Options = {**self.options, **options}
        parts: list[TextChunk] = []
        dropped_before, self._is_answering = self.dropped_messages, True
        try:
            body_bytes = await self._image_bytes([*self._before(start), question])
            if message is not None and has_images(question) and not body_bytes:
                raise UsageError("the model reads text only: send no images, or serve a model with its projector")
            while True:
                body = self._with_images_that_fit(chat_body([*self._before(start), question], merged), body_bytes)
                try:
                    async with aclosing(self._client.chunks(CHAT, body)) as chunks:
                        async for chunk in chunks:
                            parts.append(chunk)
                            yield chunk
                    return
                except LlamaclustError as error:
                    if any(part.text for part in parts) or not self._drop_turn(start, error):
                        raise
        finally:
            self._is_answering = False
            if any(part.text or part.finish_reason for part in parts):
                self.messages[start:] = [question, _message(parts)]
            else:
                self.dropped_messages = dropped_before

    async def _image_bytes(self, messages: Sequence[Message]) -> int:
        return await self._client.most_image_bytes() if any(map(has_images, messages)) else 0

    def _with_images_that_fit(self, body: dict[str, Any], body_bytes: int) -> dict[str, Any]:
        messages, self.dropped_images = with_latest_images(body["messages"], body_bytes or MAX_BODY_BYTES)
        if self.dropped_images and not self._drops_oldest:
            what = f"{self.dropped_images} images of this conversation do not fit into a request"
            raise UsageError(f"{what}: undo turns, clear the conversation, or set drop_oldest=True")
        return {**body, "messages": messages}

    def _drop_turn(self, end: int, error: LlamaclustError) -> bool:
        """Leaves out the oldest turn if the conversation is too long. Returns False if no turn was left out."""
        begin = self._first_turn() + self.dropped_messages
        if not self._drops_oldest or error.code != "context_length_exceeded" or begin >= end:
            return False
        following = (at for at in range(begin + 1, end) if self.messages[at]["role"] == "user")
        self.dropped_messages += next(following, end) - begin
        return True

    def _before(self, end: int) -> list[Message]:
        first = self._first_turn()
        return [*self.messages[:first], *self.messages[first + self.dropped_messages : end]]

    def _first_turn(self) -> int:
        others = (at for at, message in enumerate(self.messages) if message["role"] not in _SYSTEM_ROLES)
        return next(others, len(self.messages))

    def _last_turn(self) -> int:
        for at in range(len(self.messages) - 1, -1, -1):
            if self.messages[at]["role"] == "user":
                return at
        raise UsageError("the conversation has no user message yet")


class ChatSession(Session[Answer, ChunkStream]):
    """A session of a synchronous client."""


class AsyncChatSession(Session[Coroutine[None, None, Answer], AsyncChunkStream]):
    """A session for asyncio. Use `await session.send(...)`, or `async for` over its stream. `save` and `load` block."""


def _read(path: Path) -> list[dict[str, Any]]:
    return _checked(read_json(path, _MOST_BYTES))


def is_conversation(path: Path) -> bool:
    try:
        _read(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _message(parts: list[TextChunk]) -> dict[str, Any]:
    """Returns the assistant's message with the reasoning, which the chat template may leave out of later prompts."""
    reasoning = "".join(part.reasoning for part in parts)
    content = "".join(part.text for part in parts)
    return {"role": "assistant", "content": content, **({"reasoning_content": reasoning} if reasoning else {})}


def _place(path: str | PathLike[str]) -> Path:
    try:
        return Path(os.path.realpath(expand_home(os.fspath(path))))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _checked(saved: Any) -> list[dict[str, Any]]:
    """Returns the messages of a saved conversation. Raises ValueError, KeyError or TypeError for anything else."""
    messages = saved["messages"]
    if not isinstance(messages, list):
        raise TypeError("messages is not a list")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise ValueError(f"message {number} needs one of the roles {', '.join(sorted(_ROLES))}")
        if not isinstance(message.get("content"), str | list | None):
            raise ValueError(f"the content of message {number} is not text")
    json.dumps(messages, ensure_ascii=False).encode()  # Raises ValueError for lone surrogates.
    return messages
