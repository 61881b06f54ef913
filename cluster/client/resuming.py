"""A streamed request that goes on where its connection breaks, also on a coordinator that was started again."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from time import monotonic
from typing import Any

import httpx

from llamaclust.cluster.client.http_codec import EventReader, reply_error
from llamaclust.cluster.client.trust import explain_refusal
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import LlamaclustError, ProtocolError

_RESUME_S = 120.0
"""From the loss of a connection to an error, as long as a cluster waits for a worker (`timeouts.recovery`)."""
_MOST_S = 600.0
"""From the last event to an error, however often the server answers: coordinators may end faster than they compute
again what they had sent."""
_BACKOFF = Backoff(first_s=0.1, max_s=1.0)
READ_TIMEOUT_S = 20.0
"""Of a stream that is taken for lost: the server sends a comment every 5 s where it has nothing else. A machine that
lost its power closes no connection."""
_RETRIED_CODES = frozenset({"cluster_starting", "cluster_stopping", "server_busy"})


class CutShortError(ProtocolError):
    """A stream without its end."""


class ResumableStream:
    """The state of one request between its connections. Pure but for the clock: the caller sends and sleeps.

    The request is sent again as it was, with the same idempotency key and the id of the last event: the server answers
    with the events after it.
    """

    def __init__(self, url: httpx.URL) -> None:
        self._url = url
        self._key = uuid.uuid4().hex
        self._events = EventReader()
        self._was_taken = False  # by a server that streams
        self._has_failed = False  # the server does not run it
        self._lost_s: float | None = None  # when the connection was
        self._silent_s: float | None = None  # when the first one was lost since the last event
        self._attempts = 0

    @property
    def is_done(self) -> bool:
        return self._events.is_done

    @property
    def headers(self) -> dict[str, str]:
        last = self._events.last_id
        return {"Idempotency-Key": self._key, **({"Last-Event-ID": last} if last else {})}

    @property
    def last_event_id(self) -> str:
        """Of the last event that was complete; "" before the first."""
        return self._events.last_id

    @property
    def cancel_path(self) -> str:
        """What to DELETE where the answer is not wanted any more."""
        return f"v1/streams/{self._key}"

    @property
    def must_cancel(self) -> bool:
        """Also before a reply begins: the server may have the request already."""
        return not (self._has_failed or self.is_done)

    def opened(self, reply: httpx.Response, body: bytes) -> None:
        """A reply has begun; `body` is all of one that is an error. Raises that error."""
        if reply.status_code != httpx.codes.OK:
            raise reply_error(reply.status_code, reply.headers.get("retry-after"), body)
        self._was_taken = reply.headers.get("content-type", "").startswith("text/event-stream")
        self._lost_s = None
        self._events.restart()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The events that are complete with `data`."""
        self._lost_s, self._silent_s, self._attempts = None, None, 0
        return self._events.feed(data)

    def ended(self) -> None:
        """The connection ended. CutShortError where the stream did not."""
        if not self.is_done:
            raise CutShortError("the server ended the answer before it was complete")

    def pause_s(self, error: httpx.HTTPError | LlamaclustError) -> float:
        """How long to wait before the request is sent again; raises the error where that would not help."""
        if not self._is_retried(error):
            self._has_failed = not self._was_taken or isinstance(error, LlamaclustError)
            raise self._final(error) from error
        now_s = monotonic()
        self._lost_s = now_s if self._lost_s is None else self._lost_s
        self._silent_s = now_s if self._silent_s is None else self._silent_s
        if now_s - self._lost_s > _RESUME_S or now_s - self._silent_s > _MOST_S:
            raise self._final(error) from error
        self._attempts += 1
        return _BACKOFF.pause_s(self._attempts - 1)

    def _is_retried(self, error: httpx.HTTPError | LlamaclustError) -> bool:
        if isinstance(error, LlamaclustError):
            is_passing = isinstance(error, CutShortError) or error.code in _RETRIED_CODES
        else:
            is_passing = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError | httpx.TimeoutException)
        return self._was_taken and is_passing

    def _final(self, error: httpx.HTTPError | LlamaclustError) -> LlamaclustError:
        return error if isinstance(error, LlamaclustError) else unreachable(self._url, error)


def unreachable(url: httpx.URL, error: httpx.HTTPError) -> LlamaclustError:
    """A server that does not answer, or not to the end."""
    refusal = explain_refusal(str(url).rstrip("/"), error)
    if refusal is not None:
        return LlamaclustError(refusal)
    reason = str(error) or type(error).__name__
    is_broken = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError)
    what = "ended the connection in the middle of an answer" if is_broken else "does not answer"
    return LlamaclustError(f"{str(url).rstrip('/')} {what} ({reason}); is the cluster up? see `llamaclust status`")
