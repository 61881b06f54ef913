"""The interface of synchronous clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from llamaclust.cluster.client.http_codec import chat_body, completion_body, embedding_body
from llamaclust.cluster.client.types import ChunkStream, CompletionOptions, EmbeddingOptions, Message, Options
from llamaclust.cluster.front.text.answer import Answer, TextChunk, join

if TYPE_CHECKING:
    from llamaclust.cluster.front.text.embedder import Vector

Prompt = str | Sequence[int]


class TextClient(ABC):
    """Prompts and chats to answers. A context manager: closed when left. Safe to use from several threads.

    Every call raises the server's errors as LlamaclustError of the matching kind: RequestError for a request that is
    refused, QueueFullError, RequestFailedError, WorkerError, DeadlineError.
    """

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[CompletionOptions]
    ) -> Answer: ...
    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[CompletionOptions]
    ) -> ChunkStream: ...
    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Unpack[CompletionOptions]
    ) -> Answer | ChunkStream:
        """Completes a text or token ids."""
        chunks = self._complete(completion_body(prompt, options))
        return ChunkStream(chunks) if stream else join(chunks)

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Answer: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Unpack[Options]
    ) -> ChunkStream: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Unpack[Options]
    ) -> Answer | ChunkStream:
        """Answers the last message, as the model's chat template writes them."""
        chunks = self._chat(chat_body(messages, options))
        return ChunkStream(chunks) if stream else join(chunks)

    def embed(self, prompts: Sequence[Prompt], **options: Unpack[EmbeddingOptions]) -> list[Vector]:
        """Embeddings of texts or token ids, in their order: [embedding], of Euclidean norm 1."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a text: give a list of prompts")
        return self._embed(embedding_body(prompts, options)) if prompts else []

    @abstractmethod
    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text, with BOS where the model wants it unless `add_special` is false."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of some tokens."""

    @abstractmethod
    def chat_sampling(self) -> Options:
        """The sampling options of a chat for which the user chose nothing: what the cluster file or the model file
        recommends, or else the values of `llamaclust chat`. Pass them to `chat`, whose own default is greedy."""

    @abstractmethod
    def close(self) -> None:
        """Ends what still runs and releases what the client holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def _embed(self, body: dict[str, Any]) -> list[Vector]:
        """The embeddings of a body of `POST /v1/embeddings`."""

    @abstractmethod
    def _complete(self, body: dict[str, Any]) -> Generator[TextChunk, None, None]:
        """Chunks of a body of `POST /v1/completions`."""

    @abstractmethod
    def _chat(self, body: dict[str, Any]) -> Generator[TextChunk, None, None]:
        """Chunks of a body of `POST /v1/chat/completions`."""
