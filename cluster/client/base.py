"""Interfaces of the clients, for asyncio and for synchronous code. Calls return complete answers or streams."""

from __future__ import annotations

import asyncio
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, Unpack, overload

from llamaclust.cluster.client.http_codec import (
    CHAT,
    COMPLETIONS,
    CompletionOptions,
    EmbeddingOptions,
    Message,
    Options,
    Prompt,
    chat_body,
    completion_body,
    embedding_body,
)
from llamaclust.cluster.front.text.answer import Answer, TextChunk, join
from llamaclust.core.errors import LlamaclustError
from llamaclust.wire.rpc.deadlines import deadline

if TYPE_CHECKING:
    from llamaclust.cluster.front.text.embedder import Vector

_OPEN_S = 600.0
_CALL_S = 86_400.0
"""Maximum seconds to wait for a result, or for the next chunk of a stream. A large model may be slow."""

_Value = TypeVar("_Value")
_Opened = TypeVar("_Opened")
WholeT = TypeVar("WholeT")
StreamT = TypeVar("StreamT")

Chunks = AsyncGenerator[TextChunk, None]


class ChunkStream(Iterator[TextChunk]):
    """Chunks of an answer as they arrive. Reading begins the request. Closing or dropping the stream aborts it."""

    def __init__(
        self, chunks: Generator[TextChunk, None, None] | LoopValues[TextChunk], client: TextClient | None = None
    ) -> None:
        self._chunks = chunks
        self._client = client  # A client that nobody holds is closed.

    def __next__(self) -> TextChunk:
        return next(self._chunks)

    def close(self) -> None:
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncChunkStream(AsyncIterator[TextChunk]):
    """A `ChunkStream` for `async for` and `async with`."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    async def __anext__(self) -> TextChunk:
        return await anext(self._chunks)

    def __await__(self) -> Generator[None, None, Self]:
        """Returns the stream itself. Other libraries' streams must be awaited, so users may write `await` here too."""
        yield from ()
        return self

    async def aclose(self) -> None:
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


class TextCalls(ABC, Generic[WholeT, StreamT]):
    """Completes prompts and answers chats. Raises a server's errors as LlamaclustErrors, such as RequestError."""

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[CompletionOptions]
    ) -> WholeT: ...
    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[CompletionOptions]) -> StreamT: ...
    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Unpack[CompletionOptions]
    ) -> WholeT | StreamT:
        """Completes a prompt, which is a text or a list of token ids."""
        return self.deliver(self.chunks(COMPLETIONS, completion_body(prompt, options)), stream=stream)

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> WholeT: ...
    @overload
    def chat(self, messages: Sequence[Message], *, stream: Literal[True], **options: Unpack[Options]) -> StreamT: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Unpack[Options]
    ) -> WholeT | StreamT:
        """Answers a chat. The chat template of the model turns the messages into a prompt."""
        return self.deliver(self.chunks(CHAT, chat_body(messages, options)), stream=stream)

    @abstractmethod
    def chunks(self, path: str, body: dict[str, Any]) -> Chunks:
        """Yields the chunks of the answer to a request with this HTTP path and body."""

    @abstractmethod
    async def most_image_bytes(self) -> int:
        """Returns the maximum size in bytes of a request with images, or 0 if the model is known to read only text."""

    @abstractmethod
    def deliver(self, chunks: Chunks, *, stream: bool) -> WholeT | StreamT:
        """Returns the chunks as a stream or as a complete answer."""


class AsyncTextClient(TextCalls[Coroutine[None, None, Answer], AsyncChunkStream]):
    """A `TextClient` for asyncio. Use `await client.generate(...)`, or `async for` with `stream=True`."""

    def deliver(self, chunks: Chunks, *, stream: bool) -> Coroutine[None, None, Answer] | AsyncChunkStream:
        return AsyncChunkStream(chunks) if stream else _joined(chunks)

    async def embed(self, prompts: Sequence[Prompt], **options: Unpack[EmbeddingOptions]) -> list[Vector]:
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of prompts, not a string")
        return await self._embed(embedding_body(prompts, options)) if prompts else []

    @abstractmethod
    async def _embed(self, body: dict[str, Any]) -> list[Vector]:
        """Returns the embeddings for a body of `POST /v1/embeddings`."""

    @abstractmethod
    async def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Returns the token ids of a text."""

    @abstractmethod
    async def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids."""

    @abstractmethod
    async def chat_sampling(self) -> Options:
        """Returns sampling options like `TextClient.chat_sampling`."""

    @abstractmethod
    async def aclose(self) -> None:
        """Releases the resources of the client."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


async def _joined(chunks: Chunks) -> Answer:
    return join([chunk async for chunk in chunks])


class _Steps(Generic[_Value]):
    """Reads an asynchronous generator, one value at a time. `begun` contains this reader from `next` to `close`."""

    def __init__(self, values: AsyncGenerator[_Value, None], begun: set[_Steps[Any]]) -> None:
        self._values, self._begun = values, begun
        self._lock = asyncio.Lock()  # Makes `close` wait until a cancelled step has ended.
        self._task: asyncio.Task[Any] | None = None
        self._is_closed = False

    async def next(self) -> _Value | None:
        """Returns the next value, or None at the end and after `close`."""
        async with self._lock:
            if self._is_closed:
                return None
            self._begun.add(self)
            self._task = asyncio.current_task()
            try:
                return await anext(self._values, None)
            except asyncio.CancelledError:
                if self._is_closed:
                    return None
                raise
            finally:
                self._task = None

    async def close(self) -> None:
        self._is_closed = True
        if self._task is not None and not self._task.cancelling():
            self._task.cancel()
        async with self._lock:
            await self._values.aclose()
        self._begun.discard(self)


class LoopValues(Iterator[_Value]):
    """Iterates over an asynchronous generator in the event loop of `thread`. Closing or dropping the iterator closes
    the generator, and ends the iteration of a thread that is waiting for the next value."""

    def __init__(self, thread: LoopThread[Any], steps: _Steps[_Value]) -> None:
        self._thread, self._steps = thread, steps
        self._closed = weakref.finalize(self, thread.end, steps)

    def __next__(self) -> _Value:
        value = None
        try:
            if self._closed.alive:
                value = self._thread.call(self._steps.next)
        finally:
            if value is None:
                self.close()
        if value is None:
            raise StopIteration
        return value

    def close(self) -> None:
        self._closed()


class LoopThread(Generic[_Opened]):
    """Opens a resource in the event loop of a new thread. The resource stays open until `close` is called."""

    def __init__(self, open_resource: Callable[[], AbstractAsyncContextManager[_Opened]]) -> None:
        """Opens the resource. Raises the errors of `open_resource`, and DeadlineError if opening takes too long."""
        self._lock = threading.RLock()  # The garbage collector may close a stream during `call`.
        self._calls: set[Future[Any]] = set()
        self._streams: set[_Steps[Any]] = set()  # Streams that are being read.
        self._is_closed = False
        self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
        opened: Future[_Opened] = Future()
        task = self._loop.create_task(self._serve(open_resource, opened))
        self._thread = threading.Thread(target=self._run, args=(task,), name="client", daemon=True)
        self._thread.start()
        try:
            self.resource = opened.result()
        except BaseException:
            with suppress(RuntimeError):  # The loop has ended by itself.
                self._loop.call_soon_threadsafe(task.cancel)
            self._thread.join()
            raise

    def call(self, work: Callable[[], Coroutine[Any, Any, _Value]]) -> _Value:
        """Runs `work` in the loop, and returns its result. Raises DeadlineError if `work` takes too long."""
        future: Future[_Value] = Future()
        with self._lock:
            if self._is_closed:
                raise LlamaclustError("the client is closed")
            if not self._thread.is_alive():
                raise LlamaclustError("this client belongs to the process that made it: make one in each process")
            self._calls.add(future)
            # Only the loop's thread makes the coroutine, because Ctrl-C may end this thread's work at any point.
            self._loop.call_soon_threadsafe(self._begin, work, future)
        try:
            return future.result()
        except CancelledError as error:
            raise LlamaclustError("the client is closed") from error
        finally:
            future.cancel()  # Cancels the work if the caller was interrupted.
            self._calls.discard(future)

    def _begin(self, work: Callable[[], Coroutine[Any, Any, _Value]], future: Future[_Value]) -> None:
        if not future.cancelled():
            task = self._loop.create_task(_in_time(work))
            task.add_done_callback(partial(_finish_call, future))
            future.add_done_callback(partial(self._ended, task))

    def _ended(self, task: asyncio.Task[Any], future: Future[Any]) -> None:
        if future.cancelled():
            with suppress(RuntimeError):  # The loop has ended.
                self._loop.call_soon_threadsafe(task.cancel)

    def each(self, values: AsyncGenerator[_Value, None]) -> LoopValues[_Value]:
        return LoopValues(self, _Steps(values, self._streams))

    def end(self, steps: _Steps[Any]) -> None:
        # The garbage collector may call this method in the thread of the loop.
        if threading.current_thread() is self._thread and not self._is_closed:
            self._begin(steps.close, Future())
        else:
            with suppress(LlamaclustError):  # The client is closed.
                self.call(steps.close)

    def close(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                for future in tuple(self._calls):
                    future.cancel()
                self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:  # The garbage collector may call this method in any thread.
            self._thread.join()

    def _run(self, task: asyncio.Task[None]) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_until_complete(task)

    async def _serve(
        self, open_resource: Callable[[], AbstractAsyncContextManager[_Opened]], opened: Future[_Opened]
    ) -> None:
        try:
            async with AsyncExitStack() as stack:
                async with deadline("opening the client", _OPEN_S):
                    resource = await stack.enter_async_context(open_resource())
                opened.set_result(resource)
                await self._stop.wait()
                for steps in tuple(self._streams):
                    await steps.close()
        except BaseException as error:  # The constructor waits for the error and raises it.
            if not opened.done():
                opened.set_exception(error)
            elif not isinstance(error, asyncio.CancelledError):  # An interrupted constructor cancels this task.
                raise


async def _in_time(work: Callable[[], Coroutine[Any, Any, _Value]]) -> _Value:
    async with deadline("the answer to a call of the client", _CALL_S):
        return await work()


def _finish_call(future: Future[_Value], task: asyncio.Task[_Value]) -> None:
    """Gives a call's future the outcome of its task, unless the caller has cancelled the future."""
    error = None if task.cancelled() else task.exception()
    if task.cancelled():
        future.cancel()
    elif future.set_running_or_notify_cancel():
        if error is None:
            future.set_result(task.result())
        else:
            future.set_exception(error)


class TextClient(TextCalls[Answer, ChunkStream]):
    """Completes prompts and answers chats. Usable in any thread. Leaving a `with` block closes the client."""

    def __init__(self, open_client: Callable[[], AbstractAsyncContextManager[AsyncTextClient]]) -> None:
        self._thread = LoopThread(open_client)
        self._client = self._thread.resource
        self._closed = weakref.finalize(self, self._thread.close)

    def chunks(self, path: str, body: dict[str, Any]) -> Chunks:
        return self._client.chunks(path, body)

    async def most_image_bytes(self) -> int:
        return await self._client.most_image_bytes()

    def deliver(self, chunks: Chunks, *, stream: bool) -> Answer | ChunkStream:
        given = self._thread.each(chunks)
        return ChunkStream(given, self) if stream else join(given)

    def embed(self, prompts: Sequence[Prompt], **options: Unpack[EmbeddingOptions]) -> list[Vector]:
        """Returns one embedding per prompt, in order. Each is a vector of Euclidean norm 1."""
        return self._thread.call(partial(self._client.embed, prompts, **options))

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Returns the token ids of a text. They begin with BOS if the model wants it and `add_special` is true."""
        return self._thread.call(partial(self._client.tokenize, text, add_special))

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._thread.call(partial(self._client.detokenize, ids))

    def chat_sampling(self) -> Options:
        """Returns the sampling options that the cluster file or the model file recommends. Pass them to `chat`, which
        is otherwise greedy. Missing options have the defaults of `llamaclust chat`."""
        return self._thread.call(self._client.chat_sampling)

    def close(self) -> None:
        self._closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
