"""The completions of one request, one a prompt: admitted together, read one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from llamaclust.cluster.api.replies.ticket import Ticket
from llamaclust.cluster.scheduler.requests import GenerationRequest, PromptProgress
from llamaclust.cluster.state.adapters import AdapterUnloadedError
from llamaclust.cluster.text.answer import TextChunk
from llamaclust.cluster.text.budget import NOTHING, ReplySize, RowStorage
from llamaclust.cluster.text.request import CompletionRequest
from llamaclust.cluster.text.service import TextService
from llamaclust.cluster.text.stream import MAX_UNREAD_ROWS, CompletionStream, chunks_or_silence


class PromptStreams:
    """Empty until `submit`; the caller closes it."""

    def __init__(self, service: TextService, ticket: Ticket, storage: RowStorage) -> None:
        self.streams: list[CompletionStream] = []
        self.choices = 0  # of all prompts
        self._service = service
        self._ticket = ticket
        self._storage = storage
        self._reserved = NOTHING

    async def submit(self, prompts: Sequence[CompletionRequest]) -> None:
        """Submits all prompts, with one seed; where one is refused, none runs."""
        try:
            requests = [self._ticket.request(*numbered) for numbered in enumerate(prompts)]
            self._check_adapters({number for request in requests for number, _ in request.adapters})
            ready_requests = [await self._service.prepare(request) for request in requests]
            self._reserve(requests, [ready.generation for ready in ready_requests])
            for prompt, (request, ready) in enumerate(zip(requests, ready_requests, strict=True)):
                self._ticket.adapters.update(number for number, _ in request.adapters)
                recording = self._ticket.recording(prompt, request)
                self.streams.append(self._service.submit(request, ready, recording))
            self.choices = sum(request.n for request in requests)
        except BaseException:
            await self.aclose()
            raise

    def _check_adapters(self, numbers: set[int]) -> None:
        """A restored request may name a model that is an adapter only now. AdapterUnloadedError for one that it did not
        use before."""
        restoration = self._ticket.restoration
        if restoration is not None and not restoration.adapters.issuperset(
            self._service.settings.adapters.marks(numbers)
        ):
            raise AdapterUnloadedError("model: an adapter was loaded under this name meanwhile: send the request again")

    def _reserve(self, requests: Sequence[CompletionRequest], generations: Sequence[GenerationRequest]) -> None:
        """Of a streamed reply, the first prompt's answer is read while it runs, the others wait for their turn."""
        first = MAX_UNREAD_ROWS if self._storage is RowStorage.STREAMED else None
        sizes = [
            ReplySize.of(generation, request.n, self._storage, None if prompt else first)
            for prompt, (request, generation) in enumerate(zip(requests, generations, strict=True))
        ]
        self._reserved = self._service.budget.reserve(sizes)

    async def aclose(self) -> None:
        for stream in self.streams:
            await stream.aclose()
        self.streams.clear()
        self._service.budget.release(self._reserved)
        self._reserved = NOTHING

    async def chunks(self, keepalive_s: float) -> AsyncIterator[tuple[int, TextChunk | None]]:
        """All prompts' chunks, prompt by prompt; None where nothing came for a while."""
        for prompt, stream in enumerate(self.streams):
            async for chunk in chunks_or_silence(stream, keepalive_s):
                yield prompt, chunk

    async def chunks_and_progress(
        self, keepalive_s: float
    ) -> AsyncIterator[tuple[int, TextChunk | PromptProgress | None]]:
        """Likewise, and before each prompt's chunks how far it is computed."""
        for prompt, stream in enumerate(self.streams):
            async for progress in stream.progress():
                yield prompt, progress
            async for chunk in chunks_or_silence(stream, keepalive_s):
                yield prompt, chunk
