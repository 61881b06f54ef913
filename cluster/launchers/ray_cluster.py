"""Connects to an existing Ray cluster, or starts one."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc

from llamaclust.cluster.config.sections import Ray
from llamaclust.cluster.state.directory import write_private
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.worker.settings import WorkerSettings

_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_PROBE_S = 10.0
_STORE_BYTES = 80_000_000  # Size of Ray's object store, which is not used here. The minimum is 75 MiB.
_DASHBOARD = "aiohttp_cors"
"""Package that `ray[default]` installs for the dashboard. `ray logs` and `ray list` need the dashboard."""
_INSTALL = "launcher ray needs Ray: pip install 'llamaclust[ray]'"


def import_ray(*, authenticated: bool) -> Any:
    if authenticated:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"{_INSTALL} (install the same versions on every node): {error}") from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray


class RayStartError(LlamaclustError):
    """Ray did not start on this machine."""


class RayCluster:
    def __init__(self, settings: Ray, namespace: str, folder: Path) -> None:
        self._settings = settings
        self._namespace = namespace
        self._folder = folder
        self._own: Path | None = None
        # Ray reads the token once in a process, so a second start in this process needs the same token.
        self._token = secrets.token_urlsafe(32)
        self._ray: Any = None

    def open(self, workers: Sequence[WorkerSettings]) -> Any:
        """Connects to a Ray cluster, or starts one. Raises UsageError if Ray or a valid token is missing, RayStartError
        if another try may help, or LlamaclustError if Ray fails."""
        settings = self._settings
        self._ray = import_ray(authenticated=not settings.allow_unauthenticated)
        address = None if settings.address == "none" else _address(settings.address)
        if address is None:
            self._start(workers)
        else:
            _check(address, settings)
            self._connect(address=address)
        return self._ray

    def close(self) -> None:
        if self._ray is not None:
            self._ray.shutdown()
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)

    def _start(self, workers: Sequence[WorkerSettings]) -> None:
        """Starts a Ray cluster on this machine. Its folder is private, so that no other program finds the cluster."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        token = self._folder / "token"
        write_private(token, self._token)
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.pop("RAY_ADDRESS", None)
        cpus = max(len(os.sched_getaffinity(0)), sum(worker.threads or 1 for worker in workers))
        dashboard = find_spec(_DASHBOARD) is not None
        how = {"num_cpus": cpus, "object_store_memory": _STORE_BYTES, "include_dashboard": dashboard}
        self._own = Path(tempfile.mkdtemp(prefix="llamaclust-ray-"))
        try:
            self._connect(address="local", _temp_dir=str(self._own), **how)
        except LlamaclustError as error:
            raise RayStartError(str(error)) from error

    def _connect(self, **how: Any) -> None:
        quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
        try:
            self._ray.init(namespace=self._namespace, **quiet, **how)
        except SystemExit as error:  # Ray raises SystemExit if a head node does not answer.
            raise LlamaclustError(f"Ray ended the connection to {how['address']} (code {error.code})") from error
        except (OSError, RuntimeError, ValueError) as error:
            why = "check the token, the address, and that the versions of Ray and Python are the same on every node"
            raise LlamaclustError(f"Ray at {how['address']}: {_first_line(error)}; {why}") from error
        except Exception as error:  # Ray raises a plain Exception if a node did not start in time.
            raise LlamaclustError(f"Ray at {how['address']}: {_first_line(error)}; try again") from error


def _address(given: str) -> str | None:
    from ray._private.services import canonicalize_bootstrap_address

    # With "auto", Ray would accept any cluster on this machine, even of other users, and fail if there is none.
    found: str | None = canonicalize_bootstrap_address(None if given == "auto" else given)
    return found


def _check(address: str, settings: Ray) -> None:
    """Raises UsageError if a Ray cluster refuses this machine's token, or requires none and `settings` forbid that."""
    open_to_all = _probe(address, None)
    if open_to_all and not settings.allow_unauthenticated:
        why = "requires no token, so any client can run programs on it and read this cluster's secrets"
        what = "start it with RAY_AUTH_MODE=token, or set `ray: {allow_unauthenticated: true}`"
        raise UsageError(f"the Ray cluster at {address} {why}; {what}")
    if not open_to_all and not _probe(address, _token()):
        where = "RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
        raise UsageError(
            f"the Ray cluster at {address} refuses the token of this machine; put the cluster's token into {where}"
        )


def _probe(address: str, token: str | None) -> bool:
    """Returns True if the head node accepts the token. Raises LlamaclustError if the head node cannot be reached."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            call = channel.unary_unary(_ALIVE, request_serializer=None, response_deserializer=None)
            call(b"", timeout=_PROBE_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return False
            what = "start a head node there (`ray start --head`), or set `ray: {address: none}` to start a cluster here"
            why = error.code().name.lower().replace("_", " ")
            raise LlamaclustError(f"no Ray cluster answers at {address} ({why}); {what}") from error
    return True


def _token() -> str:
    from ray import _raylet
    from ray.exceptions import AuthenticationError

    try:
        loader: Any = _raylet
        return str(loader.AuthenticationTokenLoader.instance().get_raw_token())
    except (AuthenticationError, RuntimeError) as error:
        raise UsageError(f"the Ray cluster needs a token: {_first_line(error)}") from error


def _first_line(error: object) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
