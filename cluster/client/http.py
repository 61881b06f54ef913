"""Clients of the HTTP API, and a model in this process with the same interface."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload
from urllib.parse import quote

import httpx

from llamaclust.cluster.client.base import Prompt, TextClient
from llamaclust.cluster.client.http_codec import (
    ChunkReader,
    chat_body,
    completion_body,
    embedding_body,
    encode,
    field_of,
    model_entry,
    reply_error,
    sampling_options,
    vectors_of,
)
from llamaclust.cluster.client.resuming import READ_TIMEOUT_S, ResumableStream, unreachable
from llamaclust.cluster.client.trust import Verify, trust
from llamaclust.cluster.client.types import (
    AsyncChunkStream,
    ChunkStream,
    CompletionOptions,
    EmbeddingOptions,
    Message,
    Options,
    join_chunks,
)
from llamaclust.cluster.client.web_access import web_options
from llamaclust.cluster.front.text.answer import Answer, TextChunk
from llamaclust.core.errors import LlamaclustError, UsageError

if TYPE_CHECKING:
    from llamaclust.cluster.client.local import LocalClient
    from llamaclust.cluster.client.local_settings import LocalSettings
    from llamaclust.cluster.front.text.embedder import Vector

__all__ = ["Answer", "AsyncChunkStream", "AsyncClient", "ChunkStream", "Client", "Message", "Options", "TextChunk"]

DEFAULT_URL = "http://127.0.0.1:8080"
_CONNECT_S = 10.0
_IDLE_S = 60.0
_STREAMED = {"stream": True, "return_token_ids": True}
_CANCEL_S = 2.0
_EMBED_S = 600.0
"""Nothing of a reply with embeddings comes before its end."""


class Client(TextClient):
    """A cluster's HTTP API. `timeout`: seconds without a sign of life after which a call fails.

    Proxies of the environment are used, but never to this machine itself.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float = _IDLE_S,
        verify: Verify = None,
        model: str | None = None,
    ) -> None:
        """`verify`: a PEM file of certificates to trust, or a context, for addresses of other machines. `model`: one of
        the served models or adapters; None: the first model.

        UsageError for what is not the address of an HTTP server, and for a file that cannot be used. Connects with the
        first call."""
        self._http = httpx.Client(**http_options(base_url, api_key, timeout, verify))
        self._stream_timeout = _limits(timeout, READ_TIMEOUT_S)
        self._model = model

    @staticmethod
    def local(
        model: str | PathLike[str],
        threads: int | None = None,
        feature_level: str | None = None,
        settings: LocalSettings | None = None,
    ) -> LocalClient:
        """A model file in this process: the same interface, and `logits`. Arguments and errors as for `LocalClient`.

        The model is given by its path or, as text, as for the commands' `--model`.
        """
        from llamaclust.cluster.client.local import LocalClient
        from llamaclust.cluster.config.catalog import resolve_model

        file = resolve_model(model) if isinstance(model, str) else model
        return LocalClient(file, threads, feature_level, settings)

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        return field_of(self._post("tokenize", _tokenize_body(text, add_special)), "tokens", list)

    def detokenize(self, ids: Sequence[int]) -> str:
        return field_of(self._post("detokenize", {"tokens": list(ids)}), "content", str)

    def chat_sampling(self) -> Options:
        with _reaching(self._http.base_url):
            entry = model_entry(_checked(self._http.get("v1/models")), self._model)
        return sampling_options(entry.get("chat_sampling", {}))  # servers of other programs have none

    def check_model(self) -> None:
        """RequestError if the model that was given is not served; it names those that are."""
        if self._model is not None:
            with _reaching(self._http.base_url):
                _checked(self._http.get(f"v1/models/{quote(self._model, safe='')}"))

    def close(self) -> None:
        self._http.close()

    def _embed(self, body: dict[str, Any]) -> list[Vector]:
        return vectors_of(self._post("v1/embeddings", body, _EMBED_S))

    def _complete(self, body: dict[str, Any]) -> Generator[TextChunk, None, None]:
        return self._stream("v1/completions", body)

    def _chat(self, body: dict[str, Any]) -> Generator[TextChunk, None, None]:
        return self._stream("v1/chat/completions", body)

    def _stream(self, path: str, body: dict[str, Any]) -> Generator[TextChunk, None, None]:
        stream, reader = ResumableStream(self._http.base_url), ChunkReader()
        content = _encoded(body | _STREAMED, self._model)
        try:
            while not stream.is_done:
                try:
                    with self._http.stream(
                        "POST", path, content=content, headers=stream.headers, timeout=self._stream_timeout
                    ) as reply:
                        stream.opened(reply, b"" if reply.is_success else reply.read())
                        for data in reply.iter_bytes():
                            yield from map(reader.read, stream.feed(data))
                    stream.ended()
                except (httpx.HTTPError, LlamaclustError) as error:
                    time.sleep(stream.pause_s(error))
        finally:
            if stream.must_cancel:
                with suppress(httpx.HTTPError):
                    self._http.delete(stream.cancel_path, timeout=_CANCEL_S)

    def _post(self, path: str, body: dict[str, Any], read_s: float | None = None) -> bytes:
        with _reaching(self._http.base_url):
            return _checked(
                self._http.post(
                    path,
                    content=_encoded(body, self._model),
                    timeout=self._http.timeout if read_s is None else _limits(read_s, read_s),
                )
            )


class AsyncClient:
    """`Client` for asyncio: `await client.generate(...)`, or `async for` over what it gives with `stream=True`."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float = _IDLE_S,
        verify: Verify = None,
        model: str | None = None,
    ) -> None:
        """As for `Client`."""
        self._http = httpx.AsyncClient(**http_options(base_url, api_key, timeout, verify))
        self._stream_timeout = _limits(timeout, READ_TIMEOUT_S)
        self._model = model

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Unpack[CompletionOptions]
    ) -> Coroutine[None, None, Answer]: ...
    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **options: Unpack[CompletionOptions]
    ) -> AsyncChunkStream: ...
    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Unpack[CompletionOptions]
    ) -> Coroutine[None, None, Answer] | AsyncChunkStream:
        """As `Client.generate`."""
        chunks = self._stream("v1/completions", completion_body(prompt, options))
        return AsyncChunkStream(chunks) if stream else join_chunks(chunks)

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> Coroutine[None, None, Answer]: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Unpack[Options]
    ) -> AsyncChunkStream: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Unpack[Options]
    ) -> Coroutine[None, None, Answer] | AsyncChunkStream:
        """As `Client.chat`."""
        chunks = self._stream("v1/chat/completions", chat_body(messages, options))
        return AsyncChunkStream(chunks) if stream else join_chunks(chunks)

    async def embed(self, prompts: Sequence[Prompt], **options: Unpack[EmbeddingOptions]) -> list[Vector]:
        """As `Client.embed`."""
        if isinstance(prompts, str):
            raise TypeError("prompts is a text: give a list of prompts")
        return (
            vectors_of(await self._post("v1/embeddings", embedding_body(prompts, options), _EMBED_S)) if prompts else []
        )

    async def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """As `Client.tokenize`."""
        return field_of(await self._post("tokenize", _tokenize_body(text, add_special)), "tokens", list)

    async def detokenize(self, ids: Sequence[int]) -> str:
        """As `Client.detokenize`."""
        return field_of(await self._post("detokenize", {"tokens": list(ids)}), "content", str)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """The events of a streamed request with their ids, as the server sends them; a connection that breaks is
        resumed."""
        stream, content = ResumableStream(self._http.base_url), _encoded({**body, **_STREAMED}, self._model)
        try:
            while not stream.is_done:
                try:
                    async with self._http.stream(
                        "POST", path, content=content, headers=stream.headers, timeout=self._stream_timeout
                    ) as reply:
                        stream.opened(reply, b"" if reply.is_success else await reply.aread())
                        async for data in reply.aiter_bytes():
                            for event in stream.feed(data):
                                yield stream.last_event_id, event
                    stream.ended()
                except (httpx.HTTPError, LlamaclustError) as error:
                    await asyncio.sleep(stream.pause_s(error))
        finally:
            if stream.must_cancel:
                with suppress(httpx.HTTPError):
                    await asyncio.shield(self._http.delete(stream.cancel_path, timeout=_CANCEL_S))

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[TextChunk, None]:
        reader = ChunkReader()
        async with aclosing(self.events(path, body)) as events:
            async for _, event in events:
                yield reader.read(event)

    async def _post(self, path: str, body: dict[str, Any], read_s: float | None = None) -> bytes:
        with _reaching(self._http.base_url):
            return _checked(
                await self._http.post(
                    path,
                    content=_encoded(body, self._model),
                    timeout=self._http.timeout if read_s is None else _limits(read_s, read_s),
                )
            )


def http_options(base_url: str, api_key: str | None, timeout: float, verify: Verify = None) -> dict[str, Any]:
    """Arguments of both of httpx's clients. A `/v1` at the end, as OpenAI's clients want it, is taken as well."""
    try:
        url = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as error:
        raise UsageError(f"{base_url!r} is not an address: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"{base_url!r} is not the address of an HTTP server; write it like {DEFAULT_URL}")
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        if not api_key.isascii() or not api_key.isprintable() or not api_key.strip():
            raise UsageError("the API key is empty or has characters that no key has")
        headers["Authorization"] = f"Bearer {api_key}"
    return {
        "base_url": url,
        "headers": headers,
        "timeout": _limits(timeout, timeout),
        **web_options(url, trust(url, verify)),
    }


def _limits(timeout: float, read_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout, connect=min(timeout, _CONNECT_S), read=min(timeout, read_s))


def _encoded(body: Mapping[str, Any], model: str | None) -> bytes:
    return encode(body if model is None else {"model": model, **body})


def _tokenize_body(text: str, add_special: bool) -> dict[str, Any]:
    return {"content": text, "add_special": add_special}


def _checked(reply: httpx.Response) -> bytes:
    if reply.status_code != httpx.codes.OK:
        raise reply_error(reply.status_code, reply.headers.get("retry-after"), reply.content)
    return reply.content


@contextmanager
def _reaching(url: httpx.URL) -> Iterator[None]:
    """LlamaclustError where the server does not answer."""
    try:
        yield
    except httpx.HTTPError as error:
        raise unreachable(url, error) from error
