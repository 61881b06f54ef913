"""Builds the command line, standard input and environment of a worker process, and describes its exit."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace

from llamaclust.worker.settings import WorkerSettings

_INHERITED = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_INHERITED_PREFIXES = ("LC_", "PYTHON", "GRPC_", "CUDA_", "CUPY_", "NVIDIA_", "ASAN_", "TSAN_", "UBSAN_")


def worker_command(settings: WorkerSettings) -> list[str]:
    return [sys.executable, "-P", "-m", "llamaclust.worker", "--name", settings.name]


def worker_input(settings: WorkerSettings) -> bytes:
    return replace(settings, parent_pid=os.getpid()).to_json().encode()


def worker_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that a worker inherits. They contain no secrets."""
    inherited = {
        name: value for name, value in variables.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    # Otherwise NumPy would start one thread per core, which would only wait.
    return inherited | {"OPENBLAS_NUM_THREADS": "1"}


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    why = ", by `kill` or for lack of memory" if -code == signal.SIGKILL else ""
    return f"its process was killed by signal {-code} ({name}){why}"
