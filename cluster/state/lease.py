"""Uses a Kubernetes Lease as a lock, with the rules of Kubernetes' Go client. A candidate takes the Lease after it has
seen no change for the Lease's duration by its own clock, so machines' clocks may differ."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import httpx

from llamaclust.cluster.config.sections import Lease
from llamaclust.core.errors import LlamaclustError, SupersededError
from llamaclust.core.this_machine import boot_s

_RENEWED = 2 / 3
_RETRIES = 7.5
_LOOK_S = 0.1
_CONFLICT, _NOT_FOUND = 409, 404
_FIELDS = (("holderIdentity", str), ("leaseDurationSeconds", int), ("leaseTransitions", int))

_log = logging.getLogger(__name__)


class LeaseLock:
    def __init__(self, lease: Lease) -> None:
        self.identity = f"{socket.gethostname()}_{secrets.token_hex(4)}"
        self.renewed_s: float | None = None  # Time of the last renewal, by `boot_s`. None if the Lease is not held.
        self._lease = lease
        # Content of the Lease at the last look, while another process held it.
        self._seen: dict[str, Any] | None = None
        self._seen_s = 0.0
        path = f"/apis/coordination.k8s.io/v1/namespaces/{lease.namespace}/leases/{lease.name}"
        self._url = f"{lease.api}{path}"
        self._http = httpx.Client(verify=_trust(lease), timeout=lease.duration / 5, trust_env=False)

    @property
    def retry_s(self) -> float:
        return self._lease.duration / _RETRIES

    @property
    def is_current(self) -> bool:
        """True if this process renewed the Lease so recently that no other process can have taken it."""
        return self.renewed_s is not None and boot_s() - self.renewed_s < self._lease.duration * _RENEWED

    def take(self) -> bool:
        """Tries to take the Lease. Returns True on success. Raises LlamaclustError if the API server fails."""
        begun_s, lease = boot_s(), self._read()
        if not self._is_free(lease.get("spec") or {}):
            return False
        return self._write(lease, begun_s)

    def renew(self) -> None:
        """Renews the Lease. Raises SupersededError if another process has it, and LlamaclustError if the API server
        fails."""
        begun_s, lease = boot_s(), self._read()
        holder = _holder(lease)
        if holder not in ("", self.identity):
            raise SupersededError(f"{holder} has the Lease {self._lease.name} now")
        self._write(lease, begun_s)  # If the write conflicts with another one, the next call sees who holds the Lease.

    def release(self) -> None:
        self.renewed_s = None
        lease = self._read()
        if _holder(lease) == self.identity:
            lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _timestamp()}
            self._put(lease)

    def close(self) -> None:
        self._http.close()

    def _is_free(self, spec: dict[str, Any]) -> bool:
        if (spec.get("holderIdentity") or "") in ("", self.identity):
            return True
        if spec != self._seen:
            self._seen, self._seen_s = spec, boot_s()
        duration_s = spec.get("leaseDurationSeconds") or self._lease.duration
        return boot_s() - self._seen_s > duration_s

    def _write(self, lease: dict[str, Any], begun_s: float) -> bool:
        spec, now = lease.get("spec") or {}, _timestamp()
        if spec.get("holderIdentity") != self.identity:
            spec |= {"acquireTime": now, "leaseTransitions": (spec.get("leaseTransitions") or 0) + 1}
        seconds = max(1, -(-self._lease.duration // 1))
        spec |= {"holderIdentity": self.identity, "renewTime": now, "leaseDurationSeconds": int(seconds)}
        if not self._put(lease | {"spec": spec}):
            return False
        self.renewed_s = begun_s
        return True

    def _read(self) -> dict[str, Any]:
        reply = self._send("GET", None)
        if reply.status_code == _NOT_FOUND:
            raise LlamaclustError(f"Lease {self._lease.namespace}/{self._lease.name} does not exist; create it")
        lease = _json(reply)
        spec = lease.get("spec") or {}
        if not isinstance(spec, dict) or any(not isinstance(spec.get(name) or kind(), kind) for name, kind in _FIELDS):
            raise LlamaclustError(f"Lease {self._lease.name}: {self._lease.api} did not answer with a Lease")
        return lease

    def _put(self, lease: dict[str, Any]) -> bool:
        reply = self._send("PUT", lease)
        if reply.status_code == _CONFLICT:
            return False
        _json(reply)
        return True

    def _send(self, method: str, content: dict[str, Any] | None) -> httpx.Response:
        try:
            # The kubelet replaces the token from time to time.
            token = (self._lease.account / "token").read_text().strip()
            return self._http.request(method, self._url, json=content, headers={"Authorization": f"Bearer {token}"})
        # ValueError is raised if the token is not text.
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise LlamaclustError(f"Lease {self._lease.name}: {self._lease.api}: {error or repr(error)}") from error


@contextmanager
def held(lock: LeaseLock, lost: Callable[[str], None]) -> Iterator[None]:
    """Renews the Lease until the context ends, then releases it. If the Lease is lost, calls `lost` in a thread."""
    end = threading.Event()
    reasons = ["it was not renewed in time"]

    def renew() -> None:
        while not end.wait(lock.retry_s):
            try:
                lock.renew()
            except SupersededError as error:
                lost(str(error))
                return
            except LlamaclustError as error:
                reasons[0] = str(error)
                _log.warning("the Lease could not be renewed: %s", error)

    def watch() -> None:  # A separate thread watches because a request to the API server may hang.
        while not end.wait(_LOOK_S):
            if not lock.is_current:
                lost(reasons[0])
                return

    threads = [threading.Thread(target=run, name="lease", daemon=True) for run in (renew, watch)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        threads[1].join()
        threads[0].join(lock.retry_s)
        if not threads[0].is_alive():
            with suppress(LlamaclustError):
                lock.release()


def _holder(lease: dict[str, Any]) -> str:
    return (lease.get("spec") or {}).get("holderIdentity") or ""


def _timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _trust(lease: Lease) -> ssl.SSLContext | bool:
    file = lease.account / "ca.crt"
    return ssl.create_default_context(cafile=os.fspath(file)) if file.is_file() else True


def _json(reply: httpx.Response) -> dict[str, Any]:
    try:
        content = reply.json()
    except ValueError:
        content = {}
    if reply.is_success and isinstance(content, dict):
        return content
    reason = content.get("message", "") if isinstance(content, dict) else ""
    raise LlamaclustError(f"the API server answers {reply.status_code} {reason}".strip())
