"""Clients of the HTTP API. They resume a stream if its connection breaks, even after a restart of the coordinator."""

from __future__ import annotations

import asyncio
import os
import ssl
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from os import PathLike
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from llamaclust.cluster.client.base import AsyncChunkStream, AsyncTextClient, Chunks, ChunkStream, TextClient
from llamaclust.cluster.client.http_codec import (
    ChunkReader,
    Message,
    Options,
    encode,
    field_of,
    json_object,
    reply_error,
    reported_error,
    sampling_options,
    vectors_of,
)
from llamaclust.cluster.client.web_access import (
    DEFAULT_URL,
    Verify,
    explain_refusal,
    http_options,
    proxy_note,
    timeouts,
)
from llamaclust.cluster.front.text.answer import Answer, TextChunk
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import LlamaclustError, ProtocolError
from llamaclust.core.limits import MAX_BODY_BYTES

if TYPE_CHECKING:
    from llamaclust.cluster.client.local import LocalClient
    from llamaclust.cluster.front.text.embedder import Vector
    from llamaclust.cluster.launchers.in_process import LocalSettings

__all__ = ["Answer", "AsyncChunkStream", "AsyncClient", "ChunkStream", "Client", "Message", "Options", "TextChunk"]

_IDLE_S = 60.0
_STREAMED = {"stream": True, "return_token_ids": True}
_CANCEL_S = 2.0
_EMBED_S = 600.0
"""Read timeout of embeddings, in seconds. The server sends nothing until all embeddings are computed."""
_RESUME_S = 120.0
"""Seconds after which a lost connection becomes an error. Equals the default of the cluster's `timeouts.recovery`."""
_MOST_S = 600.0
"""A stream fails if its connection was lost this many seconds ago and no event has arrived since then."""
_MOST_UNANSWERED = 3
"""A request fails if this many connections were lost after it was sent and before a reply began."""
_BACKOFF = Backoff(first_s=0.1, max_s=1.0)
READ_TIMEOUT_S = 20.0
"""Seconds without data after which a stream counts as lost. The server sends a comment at least every 15 s."""
_RETRIED_CODES = frozenset({"cluster_starting", "cluster_stopping", "server_busy"})
_BROKEN = (httpx.ReadError, httpx.RemoteProtocolError)  # A connection is lost after a request was sent.
_PROXY_STATUSES = frozenset({502, 503, 504})  # A proxy sends them, without a code, while it reaches no server.


class AsyncClient(AsyncTextClient):
    """A `Client` for asyncio. Use `await client.generate(...)`, or `async for` with `stream=True`."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float = _IDLE_S,
        verify: Verify = None,
        model: str | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**http_options(base_url, api_key, timeout, verify))
        self._stream_timeout = timeouts(timeout, READ_TIMEOUT_S)
        self._model = model

    async def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        body = {"content": text, "add_special": add_special}
        return field_of(await self._request("POST", "tokenize", body), "tokens", list)

    async def detokenize(self, ids: Sequence[int]) -> str:
        return field_of(await self._request("POST", "detokenize", {"tokens": list(ids)}), "content", str)

    async def chat_sampling(self) -> Options:
        # Other programs' servers do not send this field.
        return sampling_options((await self._entry()).get("chat_sampling", {}))

    async def most_image_bytes(self) -> int:
        entry = await self._entry()
        if entry.get("owned_by") == "llamaclust" and not entry.get("capabilities", {}).get("vision"):
            return 0
        most = entry.get("max_request_bytes")
        return most if isinstance(most, int) else MAX_BODY_BYTES

    async def _entry(self) -> dict[str, Any]:
        entries = field_of(await self._request("GET", "v1/models"), "data", list)
        named = (entry for entry in entries if self._model in (entry.get("id"), *entry.get("aliases", ())))
        found: dict[str, Any] = next(named, entries[0] if entries else {})
        return found

    async def check_model(self) -> None:
        """Raises RequestError if the server does not have the client's model. The error lists the served models."""
        if self._model is not None:
            await self._request("GET", f"v1/models/{quote(self._model, safe='')}")

    async def aclose(self) -> None:
        await self._http.aclose()

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Yields the events of a streamed request as (id, event). Resumes the request if its connection breaks."""
        stream, content = ResumableStream(self._http.base_url), self._encoded({**body, **_STREAMED})
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
            if stream.must_cancel and not self._http.is_closed:
                with suppress(httpx.HTTPError):
                    await asyncio.shield(self._http.delete(stream.cancel_path, timeout=_CANCEL_S))

    async def chunks(self, path: str, body: dict[str, Any]) -> Chunks:
        reader = ChunkReader()
        async with aclosing(self.events(path, body)) as events:
            async for _, event in events:
                yield reader.read(event)

    async def _embed(self, body: dict[str, Any]) -> list[Vector]:
        return vectors_of(await self._request("POST", "v1/embeddings", body, timeouts(_EMBED_S, _EMBED_S)))

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout: httpx.Timeout | None = None
    ) -> bytes:
        content = None if body is None else self._encoded(body)
        try:
            reply = await self._http.request(method, path, content=content, timeout=timeout or self._http.timeout)
        except httpx.HTTPError as error:
            raise unreachable(self._http.base_url, error) from error
        if reply.status_code != httpx.codes.OK:
            raise reply_error(reply.status_code, reply.headers.get("retry-after"), reply.content)
        return reply.content

    def _encoded(self, body: Mapping[str, Any]) -> bytes:
        return encode(body if self._model is None else {"model": self._model, **body})


class Client(TextClient):
    """A client of a cluster's HTTP API. It uses the proxies that environment variables name, except for servers on this
    machine. A call fails if the server sends nothing for `timeout` seconds."""

    _client: AsyncClient

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float = _IDLE_S,
        verify: Verify = None,
        model: str | None = None,
    ) -> None:
        """Connects at the first call. `verify` is a PEM file of certificates to trust, or an SSL context. `model` is a
        served model or adapter, or None for the first model. Raises UsageError if the address or a file is invalid."""
        client = AsyncClient(base_url, api_key, timeout=timeout, verify=verify, model=model)
        super().__init__(lambda: client)

    @staticmethod
    def local(
        model: str | PathLike[str],
        threads: int | None = None,
        feature_level: str | None = None,
        settings: LocalSettings | None = None,
    ) -> LocalClient:
        """Loads a model in this process. `model` is a path, or any string that the option `--model` accepts. Raises the
        errors of `LocalClient`."""
        from llamaclust.cluster.client.local import LocalClient
        from llamaclust.cluster.config.catalog import resolve_model

        file = resolve_model(model) if isinstance(model, str) else model
        return LocalClient(file, threads, feature_level, settings)

    def check_model(self) -> None:
        """Raises RequestError if the server does not have the client's model. The error lists the served models."""
        self._thread.call(self._client.check_model)


class TruncatedStreamError(ProtocolError):
    """The server closed a stream before it was complete."""


class ResumableStream:
    """The server-sent events of one request. After a reconnect, they continue after the last event that arrived."""

    def __init__(self, url: httpx.URL) -> None:
        self.is_done = False
        self.last_event_id = ""  # Id of the last complete event, or "" before the first event.
        self._url = url
        self._key = uuid.uuid4().hex
        self._parts: list[bytes] = []  # Pieces of a line that has not ended.
        self._next_id = ""
        self._was_taken = False  # True once the server has begun a reply that is an event stream.
        self._unanswered = 0  # Connections that were lost after the request was sent and before a reply began.
        self._has_failed = False  # True if the server does not compute the request.
        self._lost_s: float | None = None  # Time at which the connection was lost. None while there is a connection.
        self._silent_s: float | None = None  # Time of the first lost connection after the last event, or None.
        self._attempts = 0

    @property
    def headers(self) -> dict[str, str]:
        last = {"Last-Event-ID": self.last_event_id} if self.last_event_id else {}
        return {"Idempotency-Key": self._key, **last}

    @property
    def cancel_path(self) -> str:
        return f"v1/streams/{self._key}"

    @property
    def must_cancel(self) -> bool:
        """True if the server may still be computing the request."""
        return not (self._has_failed or self.is_done)

    def opened(self, reply: httpx.Response, body: bytes) -> None:
        """Reads the status and headers of a reply. If the status is not 200, raises the error in `body`."""
        if reply.status_code != httpx.codes.OK:
            raise reply_error(reply.status_code, reply.headers.get("retry-after"), body)
        self._was_taken = reply.headers.get("content-type", "").startswith("text/event-stream")
        self._lost_s = None
        self._parts.clear()
        self._next_id = self.last_event_id  # The last connection may have ended between an event's id and its data.

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Parses the next bytes, and yields complete events. Raises an error that the server sends as an event."""
        self._lost_s, self._attempts = None, 0
        *lines, rest = data.split(b"\n")
        for line in lines:
            event = self._event(b"".join((*self._parts, line)))
            self._parts.clear()
            if event is not None:
                yield event
        self._parts.append(rest)

    def _event(self, line: bytes) -> dict[str, Any] | None:
        name, _, value = line.partition(b":")
        if name == b"id":
            self._next_id = value.strip().decode("ascii", "replace")
        if self.is_done or name != b"data" or not (payload := value.strip()):
            return None
        self.last_event_id = self._next_id
        if payload == b"[DONE]":
            self.is_done = True
            return None
        event = json_object(payload)
        if "error" in event:
            raise reported_error(event["error"])
        self._silent_s = None
        return event

    def ended(self) -> None:
        """Raises TruncatedStreamError if the connection has ended before the stream was complete."""
        if not self.is_done:
            raise TruncatedStreamError("the server ended the answer before it was complete")

    def pause_s(self, error: httpx.HTTPError | LlamaclustError) -> float:
        """Returns the seconds to wait before the next attempt. Raises the error if another attempt would not help."""
        is_own = isinstance(error, LlamaclustError)
        final = error if isinstance(error, LlamaclustError) else unreachable(self._url, error)
        if isinstance(error, _BROKEN) and not self._was_taken:
            self._unanswered += 1
        may_be_taken = self._was_taken or 0 < self._unanswered < _MOST_UNANSWERED
        if not (may_be_taken and _may_pass(error)):
            self._has_failed = is_own or not may_be_taken
            raise final from error
        now_s = monotonic()
        self._lost_s = now_s if self._lost_s is None else self._lost_s
        self._silent_s = now_s if self._silent_s is None else self._silent_s
        if now_s - self._lost_s > _RESUME_S or now_s - self._silent_s > _MOST_S:
            raise final from error
        self._attempts += 1
        return _BACKOFF.pause_s(self._attempts - 1)


def _may_pass(error: httpx.HTTPError | LlamaclustError) -> bool:
    if isinstance(error, LlamaclustError):
        is_proxy = error.code == LlamaclustError.code and error.http_status in _PROXY_STATUSES
        return is_proxy or isinstance(error, TruncatedStreamError) or error.code in _RETRIED_CODES
    return isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError | httpx.TimeoutException)


def unreachable(url: httpx.URL, error: httpx.HTTPError) -> LlamaclustError:
    where, reason = str(url).rstrip("/"), _reason(error)
    what = "ended the connection in the middle of an answer" if isinstance(error, _BROKEN) else "does not answer"
    advice = proxy_note(error) or "; is the cluster up? see `llamaclust status`"
    return LlamaclustError(explain_refusal(where, error) or f"{where} {what} ({reason}){advice}")


def _reason(error: httpx.HTTPError) -> str:
    inner: BaseException | None = error
    while inner is not None:
        cause = inner
        inner = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and cause.errno and cause.errno > 0:
        return f"[Errno {cause.errno}] {os.strerror(cause.errno)}"
    return str(error) or ("timed out" if isinstance(error, httpx.TimeoutException) else type(error).__name__)
