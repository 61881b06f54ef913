"""A client for operations on a running cluster: status, drain, undrain, worker logs, and waterfalls of requests."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlencode

import httpx

from llamaclust.cluster.client.http_codec import field_of, reply_error
from llamaclust.cluster.client.web_access import explain_refusal, http_options, proxy_note
from llamaclust.cluster.state.api_keys import first_key
from llamaclust.cluster.state.directory import ClusterRecord
from llamaclust.core.errors import LlamaclustError, ProtocolError

_Value = TypeVar("_Value")
_ANSWER_S = 10.0
_DRAIN_S = 630.0
"""Maximum seconds that a client waits for a drain. The coordinator gives up a little earlier and gives the reason."""
_MOST_BYTES = 16 << 20
_STATUS = {"name": str, "state": str, "model": str, "api": str, "workers": list, "requests": dict, "speed": dict}
"""Fields of a cluster's status. A reply without these fields is from another program."""


class ClusterApi:
    """A client for managing a cluster. Use it as a context manager. Error messages name the cluster."""

    def __init__(self, where: str, url: str, api_keys_file: Path | None, ca_file: Path | None = None) -> None:
        """`where` names the cluster in error messages. Raises UsageError if the address or a file is unusable."""
        self._where = where
        key = None if api_keys_file is None else first_key(api_keys_file)
        self._client = httpx.Client(**http_options(url, key, _ANSWER_S, ca_file))

    @classmethod
    def of(cls, record: ClusterRecord, api_keys_file: Path | None = None) -> Self:
        keys = api_keys_file or (Path(record.api_keys_file) if record.api_keys_file else None)
        return cls(f"cluster {record.name} at {record.api}", record.api, keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def status(self, model: str | None = None) -> dict[str, Any]:
        """Returns the `status` of a model (None: the first). Raises ClusterStartingError if there is no status yet."""
        path = "/cluster" if model is None else f"/cluster?{urlencode({'model': model})}"
        state: dict[str, Any] = self._field(self._request("GET", path), "status", dict)
        if not all(isinstance(state.get(name), kind) for name, kind in _STATUS.items()):
            raise ProtocolError(f"{self._where}: a program other than llamaclust answers at this address")
        return state

    def context_length(self) -> int:
        settings: dict[str, Any] = self._field(self._request("GET", "/props"), "default_generation_settings", dict)
        return int(settings["n_ctx"])

    def drain(self, worker: str) -> None:
        """Drains a worker. Returns when the worker holds no layers. Raises an error if its layers cannot move."""
        self._request("POST", f"/cluster/workers/{worker}/drain", read_s=_DRAIN_S)

    def undrain(self, worker: str) -> None:
        self._request("POST", f"/cluster/workers/{worker}/undrain")

    def log(self, worker: str) -> tuple[int, list[str]]:
        """Returns (count, lines): the last lines of a worker's log, and the count of omitted earlier lines."""
        tail = self._request("GET", f"/cluster/workers/{worker}/log")
        return self._field(tail, "before", int), self._field(tail, "lines", list)

    def requests(self) -> list[dict[str, Any]]:
        """Returns the requests that ended most recently, oldest first, and then the open requests."""
        return self._field(self._request("GET", "/cluster/requests"), "requests", list)

    def waterfall(self, request: str) -> list[dict[str, Any]]:
        """Returns a waterfall (time line) per sequence. `request` is an id, or at least its first 4 characters."""
        return self._field(self._request("GET", f"/cluster/requests/{quote(request, safe='')}"), "requests", list)

    def _field(self, body: bytes, name: str, kind: type[_Value]) -> _Value:
        try:
            return field_of(body, name, kind)
        except ProtocolError as error:
            raise ProtocolError(f"{self._where}: {error}") from error

    def _request(self, method: str, path: str, read_s: float | None = None) -> bytes:
        """Returns the complete body of a reply. Raises ProtocolError if it is too large or arrives too slowly."""
        read_s = read_s or _ANSWER_S
        body, end_s = bytearray(), monotonic() + read_s
        try:
            with self._client.stream(method, path, timeout=httpx.Timeout(_ANSWER_S, read=read_s)) as answer:
                for part in answer.iter_bytes():
                    body += part
                    if len(body) > _MOST_BYTES:
                        raise ProtocolError(f"{self._where}: the answer has more than {_MOST_BYTES >> 20} MiB")
                    if monotonic() > end_s:
                        raise ProtocolError(f"{self._where}: the rest of the answer did not arrive in time")
        except httpx.HTTPError as error:
            refusal = explain_refusal(self._where, error)
            raise LlamaclustError(refusal or f"{self._where} does not answer: {error}{proxy_note(error)}") from error
        if answer.status_code == httpx.codes.OK:
            return bytes(body)
        failure = reply_error(answer.status_code, None, bytes(body))
        failure.args = (f"{self._where}: {failure}",)
        raise failure
