"""A client of a text service in this process, which runs in an event loop on its own thread."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeVar

from llamaclust.cluster.client.base import TextClient
from llamaclust.cluster.client.http_codec import sampling_options
from llamaclust.cluster.client.types import Options
from llamaclust.cluster.front.dialects.embeddings import OpenAiEmbeddingBody
from llamaclust.cluster.front.dialects.openai.schema import ChatBody, CompletionBody
from llamaclust.cluster.front.fields.sampling import chat_sampling
from llamaclust.cluster.front.schema import read_fields
from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.completion import Completion
from llamaclust.cluster.front.text.embedder import Vector
from llamaclust.cluster.front.text.service import TextService
from llamaclust.core.errors import LlamaclustError, ParameterError

OpenService = Callable[[], AbstractAsyncContextManager[TextService]]

_CLOSED = "the client is closed"
_Value = TypeVar("_Value")


class ServiceThread:
    """Opens a service in a new thread's event loop and keeps it there."""

    def __init__(self, open_service: OpenService) -> None:
        """Returns when the service is open; raises what opening it raises. An interrupt meanwhile ends
        the thread first."""
        begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()
        ready: Future[tuple[asyncio.Event, TextService]] = Future()
        self._thread = threading.Thread(
            target=asyncio.run, args=(_serve(open_service, begun, ready),), name="service", daemon=True
        )
        self._thread.start()
        self._loop, task = begun.result()
        try:
            self._stop, self.service = ready.result()
        except BaseException:
            with suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(task.cancel)
            self._thread.join()
            raise
        self._lock = threading.RLock()  # the garbage collector may end a stream within `call`
        self._pending: set[Future[Any]] = set()
        self._is_closed = False

    def call(self, work: Coroutine[Any, Any, _Value]) -> _Value:
        """Runs `work` in the loop; an interrupt of the caller cancels it. LlamaclustError once it is closed."""
        with self._lock:
            if self._is_closed:
                work.close()
                raise LlamaclustError(_CLOSED)
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._pending.add(future)
        try:
            return future.result()
        except CancelledError as error:
            work.close()  # where the loop ended before it came to it
            raise LlamaclustError(_CLOSED) from error
        finally:
            future.cancel()  # where the caller was interrupted
            self._pending.discard(future)

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work`, which releases a resource; a closed service has released all of them."""
        if self._is_closed:
            work.close()
        elif threading.current_thread() is self._thread:  # the garbage collector may run in any thread
            asyncio.run_coroutine_threadsafe(work, self._loop)
        else:
            with suppress(LlamaclustError):  # closed meanwhile
                self.call(work)

    def close(self) -> None:
        """Ends what still runs, closes the service and waits for its end."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is self._thread:  # the garbage collector may run in any thread
            return
        self._thread.join()
        for future in tuple(self._pending):  # the loop ended before it came to these
            future.cancel()


async def _serve(
    open_service: OpenService,
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]],
    ready: Future[tuple[asyncio.Event, TextService]],
) -> None:
    stop, task = asyncio.Event(), asyncio.current_task()
    assert task is not None
    begun.set_result((asyncio.get_running_loop(), task))
    try:
        async with open_service() as service:
            ready.set_result((stop, service))
            await stop.wait()
    except BaseException as error:  # the thread's border: the waiting constructor gets the error
        if not ready.done():
            ready.set_exception(error)
        elif not isinstance(error, asyncio.CancelledError):  # by an interrupted constructor
            raise


class ServiceClient(TextClient):
    """Talks to a service that lives as long as the client."""

    def __init__(self, open_service: OpenService) -> None:
        """Raises what opening the service raises."""
        self._thread = ServiceThread(open_service)
        self._service = self._thread.service
        self._closed = weakref.finalize(self, self._thread.close)

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return self._thread.call(self._service.tokenize(text, add_special))

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._service.tokenizer.decode(ids)

    def close(self) -> None:
        self._closed()

    def _embed(self, body: dict[str, Any]) -> list[Vector]:
        fields = read_fields(OpenAiEmbeddingBody, body)
        options = fields.options(self._service.settings.pooling)

        async def vectors() -> list[Vector]:
            async with self._service.embed(fields.input, options) as embeddings:
                return [vector for embedding in embeddings for vector in embedding.vectors]

        return self._thread.call(vectors())

    def chat_sampling(self) -> Options:
        return sampling_options(chat_sampling(self._service.settings.recommended, {}))

    def _complete(self, body: dict[str, Any]) -> Generator[TextChunk, None, None]:
        requests = read_fields(CompletionBody, body).requests()
        if len(requests) != 1:
            raise ParameterError("prompt", f"{len(requests)} prompts in one call; give them one by one")
        return self._stream(lambda: self._service.start(requests[0]))

    def _chat(self, body: dict[str, Any]) -> Generator[TextChunk, None, None]:
        chat = read_fields(ChatBody, body)

        async def start() -> Completion:
            return await self._service.start(await self._service.chat(chat.request()))

        return self._stream(start)

    def _stream(self, start: Callable[[], Coroutine[Any, Any, Completion]]) -> Generator[TextChunk, None, None]:
        stream = self._thread.call(start())
        try:
            yield TextChunk(prompt_token_ids=stream.generation.prompt, seed=stream.generation.seed)
            while (chunk := self._thread.call(_next(stream))) is not None:
                yield chunk
        finally:
            self._thread.finish(stream.aclose())


async def _next(stream: Completion) -> TextChunk | None:
    return await anext(stream, None)
