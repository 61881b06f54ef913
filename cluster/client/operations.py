"""Client of a running cluster's operations: status, drain, undrain, logs, where the time of requests went."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx

from llamaclust.cluster.client.http import http_options
from llamaclust.cluster.client.http_codec import reply_error
from llamaclust.cluster.client.trust import explain_refusal
from llamaclust.cluster.state.api_keys import first_key
from llamaclust.cluster.state.directory import ClusterRecord
from llamaclust.core.errors import LlamaclustError

_ANSWER_S = 10.0
_DRAIN_S = 630.0
"""The coordinator gives up a little earlier, and says why."""


class ClusterApi:
    """A context manager: holds a connection while it is entered. Errors name the cluster and its address."""

    def __init__(self, where: str, url: str, api_keys_file: Path | None, ca_file: Path | None = None) -> None:
        """`where`: its name in errors. UsageError for what is not the address of an HTTP server, and without a key or
        certificates in the files."""
        self._where = where
        key = None if api_keys_file is None else first_key(api_keys_file)
        self._client = httpx.Client(**http_options(url, key, _ANSWER_S, ca_file))

    @classmethod
    def of(cls, record: ClusterRecord, api_keys_file: Path | None = None) -> Self:
        """Of a cluster on this machine."""
        keys = api_keys_file or (Path(record.api_keys_file) if record.api_keys_file else None)
        return cls(f"cluster {record.name} at {record.api}", record.api, keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def status(self) -> dict[str, Any]:
        """The `status` part of GET /cluster."""
        state: dict[str, Any] = self._request("GET", "/cluster")["status"]
        return state

    def context_length(self) -> int:
        """Tokens that one sequence may have."""
        tokens: int = self._request("GET", "/props")["default_generation_settings"]["n_ctx"]
        return tokens

    def drain(self, worker: str) -> None:
        """`worker` is a name that a worker may have. Returns when it holds no layers; InsufficientMemoryError or
        another error where it has to hold them."""
        self._request("POST", f"/cluster/workers/{worker}/drain", read_s=_DRAIN_S)

    def undrain(self, worker: str) -> None:
        self._request("POST", f"/cluster/workers/{worker}/undrain")

    def log(self, worker: str) -> tuple[int, list[str]]:
        """(how many lines its process wrote before, the last ones)."""
        tail = self._request("GET", f"/cluster/workers/{worker}/log")
        return tail["before"], tail["lines"]

    def requests(self) -> list[dict[str, Any]]:
        """Those that are open and the last ones that ended, the oldest first."""
        found: list[dict[str, Any]] = self._request("GET", "/cluster/requests")["requests"]
        return found

    def waterfall(self, request: str) -> list[dict[str, Any]]:
        """Of each sequence of a request, by its id or the first 4 characters or more of that."""
        found: list[dict[str, Any]] = self._request("GET", f"/cluster/requests/{quote(request, safe='')}")["requests"]
        return found

    def _request(self, method: str, path: str, read_s: float = _ANSWER_S) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, timeout=httpx.Timeout(_ANSWER_S, read=read_s))
        except httpx.HTTPError as error:
            refusal = explain_refusal(self._where, error)
            raise LlamaclustError(refusal or f"{self._where} does not answer: {error}") from error
        if answer.status_code == httpx.codes.OK:
            body: dict[str, Any] = answer.json()
            return body
        failure = reply_error(answer.status_code, None, answer.content)
        raise type(failure)(f"{self._where}: {failure}")
