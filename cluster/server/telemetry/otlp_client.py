"""Sends messages to a collector by OTLP over HTTP, and repeats failed attempts. All calls block."""

from __future__ import annotations

import gzip
import logging
from enum import Enum, auto
from http import HTTPStatus
from pathlib import Path
from threading import Event
from typing import Final

import httpx

from llamaclust.cluster.client.web_access import authorities, web_options
from llamaclust.cluster.server.telemetry.settings import Target
from llamaclust.core.errors import UsageError
from llamaclust.core.version import VERSION

_PAUSES_S: Final = (1.0, 2.0, 4.0)
"""Seconds between attempts to send a message. If the previous message failed too, there is only one attempt."""
_AGAIN: Final = frozenset({429, 502, 503, 504})
"""HTTP status codes on which OTLP clients must try again."""

_log = logging.getLogger(__name__)


class _Outcome(Enum):
    TAKEN = auto()
    REFUSED = auto()  # The collector would refuse the same message again.
    FAILED = auto()  # Another attempt may succeed.


class OtlpClient:
    def __init__(self, target: Target, stopping: Event) -> None:
        """Creates the client. Setting `stopping` ends its retries. Raises UsageError if the URL is invalid."""
        self._target = target
        self._stopping = stopping
        self._is_known_absent = False
        self._error = ""  # Error of the last failed attempt.
        trusted = None if target.certificate is None else authorities(Path(target.certificate))
        try:
            url = httpx.URL(target.url)
        except httpx.InvalidURL as error:
            raise UsageError(f"telemetry: {target.url}: {error}") from error
        fixed = {"content-type": "application/x-protobuf", "user-agent": f"llamaclust/{VERSION}"}
        encoding = {"content-encoding": "gzip"} if target.is_compressed else {}
        self._client = httpx.Client(
            headers={**target.headers, **fixed, **encoding},
            timeout=target.timeout_s,
            **web_options(url, trusted),
        )

    def close(self) -> None:
        self._client.close()

    def send(self, message: bytes, timeout_s: float | None = None) -> bool:
        body = gzip.compress(message, 1) if self._target.is_compressed else message
        limit_s = self._target.timeout_s if timeout_s is None else min(timeout_s, self._target.timeout_s)
        outcome = self._post(body, limit_s)
        for pause_s in _PAUSES_S:
            if outcome is not _Outcome.FAILED or self._is_known_absent or self._stopping.wait(pause_s):
                break
            outcome = self._post(body, limit_s)
        self._note(outcome)
        return outcome is _Outcome.TAKEN

    def _post(self, body: bytes, timeout_s: float) -> _Outcome:
        try:
            with self._client.stream("POST", self._target.url, content=body, timeout=timeout_s) as reply:
                status = reply.status_code
                if reply.headers.get("content-length", "") == "0":
                    reply.read()  # Reading the empty body lets the connection be used again.
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            self._error = f"{type(error).__name__}: {error}"
            return _Outcome.FAILED
        if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            return _Outcome.TAKEN
        self._error = f"HTTP {status}"
        return _Outcome.FAILED if status in _AGAIN else _Outcome.REFUSED

    def _note(self, outcome: _Outcome) -> None:
        if (outcome is not _Outcome.TAKEN) == self._is_known_absent:
            return
        self._is_known_absent = not self._is_known_absent
        if self._is_known_absent:
            _log.warning("telemetry: %s does not accept messages, which are dropped: %s", self._target.url, self._error)
        else:
            _log.info("telemetry: %s accepts messages again", self._target.url)
