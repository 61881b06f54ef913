"""Clients without a server. They call a text service in this process. LocalClient also loads the model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamaclust.cluster.client.base import AsyncTextClient, Chunks, TextClient
from llamaclust.cluster.client.http_codec import CHAT, Options, sampling_options
from llamaclust.cluster.front.dialects.embeddings import OpenAiEmbeddingBody
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.images.chat_images import with_images
from llamaclust.cluster.front.images.urls import ImageRules
from llamaclust.cluster.front.schema import BodyContext, read_fields
from llamaclust.cluster.front.shared_fields import chat_sampling
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.embedder import Vector
from llamaclust.cluster.front.text.service import TextService
from llamaclust.cluster.launchers.in_process import LocalSettings, LocalStage
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import MAX_BODY_BYTES

if TYPE_CHECKING:
    from llamaclust.kernels.backend import Float32

OpenService = Callable[[], AbstractAsyncContextManager[TextService]]


class AsyncServiceClient(AsyncTextClient):
    """A client of a text service in this process. Accepts the HTTP client's options, with the same checks."""

    def __init__(self, service: TextService) -> None:
        self.service = service

    async def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return await self.service.tokenize(text, add_special)

    async def detokenize(self, ids: Sequence[int]) -> str:
        return self.service.tokenizer.decode(ids)

    async def chat_sampling(self) -> Options:
        return sampling_options(chat_sampling(self.service.settings.recommended, {}))

    async def most_image_bytes(self) -> int:
        return 0 if self.service.vision is None else MAX_BODY_BYTES

    async def chunks(self, path: str, body: dict[str, Any]) -> Chunks:
        if path == CHAT:
            images = None if self.service.vision is None else ImageRules()
            chat = read_fields(ChatBody, body, BodyContext(images)).request()
            request = await self.service.chat(await with_images(chat))
        else:
            request, *others = read_fields(CompletionBody, body).requests()
            if others:
                raise ParameterError("prompt", f"{len(others) + 1} prompts in one call; give one prompt in each call")
        async with await self.service.start(request) as completion:
            generation = completion.generation
            yield TextChunk(prompt_token_ids=generation.prompt, seed=generation.seed)
            async for chunk in completion.log.chunks():
                yield chunk

    async def _embed(self, body: dict[str, Any]) -> list[Vector]:
        fields = read_fields(OpenAiEmbeddingBody, body)
        async with self.service.embed(fields.input, fields.options(self.service.settings.pooling)) as embeddings:
            return [vector for embedding in embeddings for vector in embedding.vectors]

    async def aclose(self) -> None:
        """Does nothing. The service is closed by its owner."""


class ServiceClient(TextClient):
    _client: AsyncServiceClient

    def __init__(self, open_service: OpenService) -> None:
        @asynccontextmanager
        async def opened() -> AsyncIterator[AsyncServiceClient]:
            async with open_service() as service:
                yield AsyncServiceClient(service)

        super().__init__(opened)


class LocalClient(ServiceClient):
    """A client that loads a model instead of calling a server. `threads` defaults to all cores. `feature_level`
    defaults to the environment variable LLAMACLUST_FEATURE_LEVEL, or else to the best level of this machine."""

    def __init__(
        self,
        path: str | PathLike[str],
        threads: int | None = None,
        feature_level: str | None = None,
        settings: LocalSettings | None = None,
    ) -> None:
        """Loads the model. Raises UsageError for bad settings, and ModelFileError or InsufficientMemoryError."""
        self._stage = LocalStage(Path(path).expanduser(), threads, feature_level, settings or LocalSettings())
        super().__init__(self._stage.serve)

    @property
    def feature_level(self) -> str:
        return self._stage.feature_level

    @property
    def placement(self) -> str:
        """Text with the number of layers on GPUs and the layers of each device. Empty without GPUs."""
        return self._stage.placement

    @property
    def unused_projectors(self) -> str | None:
        """Reason why no projector in the model's folder is used. None if a projector is used, missing or not wanted."""
        return self._stage.unused_projectors

    @property
    def vocabulary_size(self) -> int:
        return self._stage.scheduling.vocabulary

    def logits(self, token_ids: Sequence[int]) -> Float32:
        """Returns logits ([tokens, vocabulary]) after each token. Raises RequestError if ids are bad or too many."""
        parts: list[Float32] = []
        self.each_logits(token_ids, 0, lambda part: parts.append(part.copy()))
        return np.concatenate(parts)

    def each_logits(self, token_ids: Sequence[int], start: int, use: Callable[[Float32], None]) -> None:
        """Calls `use` with a few rows of logits at a time. The rows belong to the tokens from index `start` on, in
        order. They are valid until `use` returns. Raises the errors of `logits`."""
        self._stage.logits(tuple(token_ids), start, use)
