"""The reply of endpoints that give one answer to one chat, streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

from llamaclust.cluster.api.json_parts import is_large
from llamaclust.cluster.api.replies.json_body import JsonBody, json_body
from llamaclust.cluster.api.replies.prompt_streams import PromptStreams
from llamaclust.cluster.api.replies.reply import Event
from llamaclust.cluster.api.replies.ticket import Ticket
from llamaclust.cluster.api.settings import ApiSettings
from llamaclust.cluster.scheduler.requests import PromptProgress
from llamaclust.cluster.text.answer import TextChunk
from llamaclust.cluster.text.budget import RowStorage
from llamaclust.cluster.text.request import CompletionRequest
from llamaclust.cluster.text.service import TextService
from llamaclust.cluster.text.stream import CompletionStream

ShowProgress = Callable[[PromptProgress], Iterable[Event]]
MakeRequest = Callable[[], Awaitable[CompletionRequest]]
"""Prepares the completion; raises what refuses it."""


class AnswerShape(Protocol):
    """How an API shows an answer."""

    @property
    def has_measurements(self) -> bool:
        """See `Reply`; those of a stream's last event do not count."""
        ...

    @property
    def progress(self) -> ShowProgress | None:
        """The events that say how far the prompt is computed, where they are wanted."""
        ...

    @property
    def keeps_logprobs(self) -> bool:
        """Whether a stream holds those of all tokens until it ends."""
        ...

    async def whole(self, chunks: Sequence[TextChunk], stream: CompletionStream) -> dict[str, Any]:
        """The JSON of a reply that is not streamed."""
        ...

    async def events(self, chunk: TextChunk, stream: CompletionStream) -> Sequence[bytes]:
        """The events that a chunk adds to a stream: on the first chunk also those that begin it, on the last one those
        that end it. Many numbers are rendered on a thread."""
        ...


class AnswerReply:
    """See `Reply`."""

    def __init__(
        self,
        service: TextService,
        settings: ApiSettings,
        ticket: Ticket,
        shape: AnswerShape,
        request: MakeRequest,
        *,
        is_streamed: bool,
        acknowledgement: bytes | None = None,
    ) -> None:
        self.is_streamed = is_streamed
        self.acknowledgement = acknowledgement
        self._settings = settings
        self._shape = shape
        self._request = request
        storage = RowStorage.STREAMED if is_streamed and not shape.keeps_logprobs else RowStorage.CHUNKS
        self._prompts = PromptStreams(service, ticket, storage)

    @property
    def has_measurements(self) -> bool:
        return self._shape.has_measurements

    @property
    def _stream(self) -> CompletionStream:
        (stream,) = self._prompts.streams
        return stream

    async def start(self) -> None:
        await self._prompts.submit([await self._request()])

    async def wait_first(self) -> None:
        await self._stream.wait_first(self._settings.first_chunk_s)

    async def aclose(self) -> None:
        await self._prompts.aclose()

    async def whole(self) -> JsonBody:
        chunks = [chunk async for chunk in self._stream]
        value = await self._shape.whole(chunks, self._stream)
        prompt = self._stream.generation.prompt  # which some APIs show
        entries = sum(chunk.entries for chunk in chunks)
        return json_body(lambda: value, is_large=is_large(entries + len(prompt)))

    async def events(self) -> AsyncGenerator[Event | None, None]:
        show_progress = self._shape.progress
        read = self._prompts.chunks if show_progress is None else self._prompts.chunks_and_progress
        async for _, chunk in read(self._settings.keepalive_s):
            if chunk is None:
                yield None
            elif isinstance(chunk, PromptProgress):
                assert show_progress is not None
                for shown in show_progress(chunk):
                    yield shown
            else:
                for data in await self._shape.events(chunk, self._stream):
                    yield Event(0, data)
