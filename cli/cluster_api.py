"""What commands ask of a running cluster over its HTTP API: how it does, and which workers are to hold layers."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from llamaclust.cluster.api.settings import first_key
from llamaclust.cluster.state.directory import ClusterRecord
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError, UsageError

_ANSWER_S = 10.0
_DRAIN_S = 630.0
"""The coordinator gives up a little earlier, and says why."""
_KINDS: dict[int, type[LlamaclustError]] = {
    UsageError.http_status: UsageError,
    InsufficientMemoryError.http_status: InsufficientMemoryError,
}


class ClusterApi:
    """A context manager: holds a connection while it is entered. Errors name the cluster and its address."""

    def __init__(self, record: ClusterRecord) -> None:
        headers = {}
        if record.api_keys_file is not None:
            headers["Authorization"] = f"Bearer {first_key(Path(record.api_keys_file))}"
        self._where = f"cluster {record.name} at {record.api}"
        self._client = httpx.Client(base_url=record.api, headers=headers, timeout=_ANSWER_S, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def status(self) -> dict[str, Any]:
        """The `status` part of GET /cluster."""
        state: dict[str, Any] = self._ask("GET", "/cluster")["status"]
        return state

    def drain(self, worker: str) -> None:
        """`worker` is a name that a worker may have. Returns when it holds no layers; InsufficientMemoryError or
        another error where it has to hold them."""
        self._ask("POST", f"/cluster/workers/{worker}/drain", httpx.Timeout(_ANSWER_S, read=_DRAIN_S))

    def undrain(self, worker: str) -> None:
        self._ask("POST", f"/cluster/workers/{worker}/undrain")

    def log(self, worker: str) -> tuple[int, list[str]]:
        """(how many lines its process wrote before, the last ones)."""
        told = self._ask("GET", f"/cluster/workers/{worker}/log")
        return told["before"], told["lines"]

    def _ask(self, method: str, path: str, timeout: httpx.Timeout | None = None) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, timeout=timeout or _ANSWER_S)
        except httpx.HTTPError as error:
            raise LlamaclustError(f"{self._where} does not answer: {error}") from error
        if answer.status_code == httpx.codes.OK:
            told: dict[str, Any] = answer.json()
            return told
        raise _KINDS.get(answer.status_code, LlamaclustError)(f"{self._where}: {_message(answer)}")


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text.strip()
