"""Chat sessions: a conversation and the client that answers it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import TYPE_CHECKING, Literal, Unpack, overload

from llamaclust.cluster.client.conversation import Conversation
from llamaclust.cluster.client.types import AsyncChunkStream, ChunkStream, Message, Options, join_chunks
from llamaclust.cluster.front.text.answer import Answer, TextChunk, join
from llamaclust.core.errors import LlamaclustError

if TYPE_CHECKING:
    from llamaclust.cluster.client.base import TextClient
    from llamaclust.cluster.client.http import AsyncClient


class ChatSession(Conversation):
    """A conversation with a model, over HTTP or in this process. The client stays open when the session is dropped.

    The options, such as `stop` with words that end an answer, are those of `Client.chat` and hold for every answer.
    What the prefix cache still has of the conversation is not computed again. For one thread at a time.
    """

    def __init__(
        self, client: TextClient, system: str | None = None, *, drop_oldest: bool = False, **options: Unpack[Options]
    ) -> None:
        super().__init__(system, options, drop_oldest=drop_oldest)
        self._client = client

    @overload
    def send(self, text: str, *, stream: Literal[False] = False, **options: Unpack[Options]) -> Answer: ...
    @overload
    def send(self, text: str, *, stream: Literal[True], **options: Unpack[Options]) -> ChunkStream: ...
    def send(self, text: str, *, stream: bool = False, **options: Unpack[Options]) -> Answer | ChunkStream:
        """The answer to a message of the user. Options given here hold for this answer alone.

        Both messages are part of the conversation when the answer or its stream has ended. Of a stream that is closed
        and of an answer that fails, what came stays; without any text, the conversation is as before.
        """
        chunks = self._answer({"role": "user", "content": text}, options)
        return ChunkStream(chunks) if stream else join(chunks)

    @overload
    def regenerate(self, *, stream: Literal[False] = False, **options: Unpack[Options]) -> Answer: ...
    @overload
    def regenerate(self, *, stream: Literal[True], **options: Unpack[Options]) -> ChunkStream: ...
    def regenerate(self, *, stream: bool = False, **options: Unpack[Options]) -> Answer | ChunkStream:
        """Another answer to the user's last message, in place of the one that there is. UsageError without a message.

        The seed decides the answer: another answer needs another `seed`, or none.
        """
        self._last_turn()
        chunks = self._answer(None, options)
        return ChunkStream(chunks) if stream else join(chunks)

    def _answer(self, message: Message | None, options: Options) -> Generator[TextChunk, None, None]:
        merged: Options = {**self.options, **options}
        with self._turn(message) as turn:
            while True:
                try:
                    with self._client.chat(turn.messages, stream=True, **merged) as chunks:
                        for chunk in chunks:
                            turn.take(chunk)
                            yield chunk
                    return
                except LlamaclustError as error:
                    if not turn.shorten(error):
                        raise


class AsyncChatSession(Conversation):
    """`ChatSession` for asyncio: `await session.send(...)`, or `async for` over what it gives with `stream=True`.
    Reading and writing a conversation's file blocks."""

    def __init__(
        self, client: AsyncClient, system: str | None = None, *, drop_oldest: bool = False, **options: Unpack[Options]
    ) -> None:
        """As for `ChatSession`."""
        super().__init__(system, options, drop_oldest=drop_oldest)
        self._client = client

    @overload
    def send(
        self, text: str, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Coroutine[None, None, Answer]: ...
    @overload
    def send(self, text: str, *, stream: Literal[True], **options: Unpack[Options]) -> AsyncChunkStream: ...
    def send(
        self, text: str, *, stream: bool = False, **options: Unpack[Options]
    ) -> Coroutine[None, None, Answer] | AsyncChunkStream:
        """As `ChatSession.send`."""
        chunks = self._answer({"role": "user", "content": text}, options)
        return AsyncChunkStream(chunks) if stream else join_chunks(chunks)

    @overload
    def regenerate(
        self, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Coroutine[None, None, Answer]: ...
    @overload
    def regenerate(self, *, stream: Literal[True], **options: Unpack[Options]) -> AsyncChunkStream: ...
    def regenerate(
        self, *, stream: bool = False, **options: Unpack[Options]
    ) -> Coroutine[None, None, Answer] | AsyncChunkStream:
        """As `ChatSession.regenerate`."""
        self._last_turn()
        chunks = self._answer(None, options)
        return AsyncChunkStream(chunks) if stream else join_chunks(chunks)

    async def _answer(self, message: Message | None, options: Options) -> AsyncGenerator[TextChunk, None]:
        merged: Options = {**self.options, **options}
        with self._turn(message) as turn:
            while True:
                try:
                    async with self._client.chat(turn.messages, stream=True, **merged) as chunks:
                        async for chunk in chunks:
                            turn.take(chunk)
                            yield chunk
                    return
                except LlamaclustError as error:
                    if not turn.shorten(error):
                        raise
