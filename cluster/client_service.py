"""A client of a text service in this process, which runs in an event loop on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, TypeVar

from llamaclust.cluster.api.openai_shapes import json_logprob
from llamaclust.cluster.client_base import Prompt, TextClient
from llamaclust.cluster.client_types import Chunk, Message, Settings
from llamaclust.cluster.text import TextService
from llamaclust.cluster.text_choice import TextChunk
from llamaclust.cluster.text_request import CompletionRequest, ParameterError
from llamaclust.cluster.text_stream import CompletionStream
from llamaclust.errors import LlamaclustError
from llamaclust.wire.messages import SamplingParams

OpenService = Callable[[], AbstractAsyncContextManager[TextService]]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_CLOSED = "the client is closed"
_Value = TypeVar("_Value")


class ServiceThread:
    """Opens a service in a new thread's event loop and keeps it there."""

    def __init__(self, open_service: OpenService) -> None:
        """Returns when the service is open; raises what opening it raises."""
        ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, TextService]] = Future()
        self._thread = threading.Thread(
            target=asyncio.run, args=(_serve(open_service, ready),), name="service", daemon=True
        )
        self._thread.start()
        self._loop, self._stop, self.service = ready.result()
        self._lock = threading.RLock()  # the garbage collector may end a stream within `call`
        self._pending: set[Future[Any]] = set()
        self._is_closed = False

    def call(self, work: Coroutine[Any, Any, _Value]) -> _Value:
        """Runs `work` in the loop; whoever is interrupted meanwhile ends it. LlamaclustError once it is closed."""
        with self._lock:
            if self._is_closed:
                work.close()
                raise LlamaclustError(_CLOSED)
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._pending.add(future)
        try:
            return future.result()
        except CancelledError as error:
            raise LlamaclustError(_CLOSED) from error
        finally:
            future.cancel()  # where the caller was interrupted
            self._pending.discard(future)

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work`, which gives something back; what a closed service held is back already."""
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
    open_service: OpenService, ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, TextService]]
) -> None:
    stop = asyncio.Event()
    try:
        async with open_service() as service:
            ready.set_result((asyncio.get_running_loop(), stop, service))
            await stop.wait()
    except BaseException as error:  # the thread's border: whoever waits is told
        if ready.done():
            raise
        ready.set_exception(error)


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
        return self._service.detokenize(ids)

    def close(self) -> None:
        self._closed()

    def _complete(self, prompt: Prompt, settings: Settings, score_from: int | None) -> Generator[Chunk, None, None]:
        async def request() -> CompletionRequest:
            return _request(prompt, settings, score_from)

        return self._stream(request)

    def _chat(self, messages: Sequence[Message], settings: Settings) -> Generator[Chunk, None, None]:
        async def request() -> CompletionRequest:
            prompt = await self._service.chat_prompt(list(map(_message, messages, range(len(messages)))))
            return _request(prompt, settings, None)

        return self._stream(request)

    def _stream(self, request: Callable[[], Awaitable[CompletionRequest]]) -> Generator[Chunk, None, None]:
        async def start() -> CompletionStream:
            return await self._service.start(await request())

        stream = self._thread.call(start())
        try:
            yield Chunk(prompt_token_ids=stream.prompt_token_ids, seed=stream.seed)
            while (chunk := self._thread.call(_next(stream))) is not None:
                yield _chunk(chunk)
        finally:
            self._thread.finish(stream.aclose())


async def _next(stream: CompletionStream) -> TextChunk | None:
    return await anext(stream, None)


def _chunk(chunk: TextChunk) -> Chunk:
    return Chunk(
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=tuple(map(json_logprob, chunk.logprobs)),
        prompt_logprobs=tuple(json_logprob(row.logprob) for row in chunk.prompt_rows),
        finish_reason=None if chunk.finish_reason is None else str(chunk.finish_reason),
        timings=chunk.timings,
    )


def _request(prompt: Prompt, settings: Settings, score_from: int | None) -> CompletionRequest:
    return CompletionRequest(
        prompt if isinstance(prompt, str) else tuple(prompt),
        settings.max_tokens,
        _sampling(settings),
        seed=settings.seed,
        stop=settings.stop_strings,
        stop_token_ids=frozenset(settings.stop_token_ids),
        min_tokens=settings.min_tokens,
        ignore_eos=settings.ignore_eos,
        score_from=score_from,
        penalty_window=settings.penalty_window,
    )


def _sampling(settings: Settings) -> SamplingParams:
    return SamplingParams(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        frequency_penalty=settings.frequency_penalty,
        presence_penalty=settings.presence_penalty,
        logit_bias=tuple(sorted(settings.logit_bias.items())),
    )


def _message(message: Mapping[str, Any], place: int) -> dict[str, str]:
    """A message as chat templates know it, checked as the HTTP API does. ParameterError names its place."""
    role, content, name = message.get("role"), message.get("content"), message.get("name")
    if role not in _ROLES:
        raise ParameterError(f"messages[{place}]", f"role must be one of {', '.join(_ROLES)}, is {str(role)[:60]!r}")
    if not isinstance(content, str):
        raise ParameterError(f"messages[{place}]", "content must be a string")
    return {"role": _ROLES[role], "content": content} | ({"name": name} if isinstance(name, str) else {})
