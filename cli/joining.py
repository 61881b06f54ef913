"""`worker`: from options to a worker process."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import NoReturn

from llamaclust.wire.rpc.grpc_options import tune_grpc

tune_grpc()

from llamaclust.cli.gpu_options import Gpus, option_value  # noqa: E402
from llamaclust.cluster.config.environment import environment  # noqa: E402
from llamaclust.cluster.config.values import expand_home, parse_name, parse_size, split_address  # noqa: E402
from llamaclust.cluster.launchers.worker_settings import with_caches  # noqa: E402
from llamaclust.core.errors import UsageError  # noqa: E402
from llamaclust.worker.settings import WorkerSettings  # noqa: E402

_TOKEN = "join-token"
_JOIN_S = 15.0


def settings(
    join: str,
    token_file: Path | None,
    name: str | None,
    listen: str,
    advertise: str,
    gpus: Gpus,
    threads: int | None,
    memory: str | None,
    model_dir: Path | None,
    insecure: bool,
) -> WorkerSettings:
    """UsageError names the option with a bad value."""
    variables = environment()
    if insecure and token_file is not None:
        raise UsageError("--insecure and --token-file: choose one; an insecure cluster has no token")
    device, gpu_layers, gpu_memory_bytes = gpus.parsed
    own = WorkerSettings(
        name=option_value("--name", parse_name, name or socket.gethostname().split(".")[0]),
        join=option_value("--join", _address, join),
        listen=option_value("--listen", _address, listen) if listen else "",
        advertise=option_value("--advertise", _advertised, advertise) if advertise else "",
        device=device,
        gpu_layers=gpu_layers,
        gpu_memory_bytes=gpu_memory_bytes,
        threads=threads,
        memory_bytes=None if memory is None else option_value("--memory", parse_size, memory),
        feature_level=variables.feature_level or "",
        join_s=_JOIN_S,
        static=True,
        log_format=variables.log_format,
        model_dir=None if model_dir is None else Path(option_value("--model-dir", expand_home, str(model_dir))),
        token_file=None if insecure else _token_file(token_file, variables.state_dir),
    )
    return with_caches(own)


def work(settings: WorkerSettings) -> NoReturn:
    """Runs the worker, and ends this process with it."""
    from llamaclust.worker.main import end_process, run_worker

    end_process(run_worker(settings))


def _address(value: str) -> str:
    split_address(value)
    return value


def _advertised(value: str) -> str:
    """HOST or HOST:PORT."""
    split_address(value if ":" in value.rpartition("]")[2] else f"{value}:0")
    return value


def _token_file(given: Path | None, state_dir: Path) -> Path:
    path = given or state_dir / _TOKEN
    if given is None and not path.exists():
        raise UsageError(f"--token-file: needed, since there is no {path}; `llamaclust up` prints where the token is")
    return path
