"""A worker's process as launchers on its machine start it: its command line, what it inherits, how it ended."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from llamaclust.cluster.launchers.base import WorkerSpec

_INHERITED = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_INHERITED_PREFIXES = ("LC_", "PYTHON", "GRPC_", "CUDA_", "CUPY_", "NVIDIA_", "ASAN_", "TSAN_", "UBSAN_")


def worker_command(spec: WorkerSpec, join: str, *flags: str, **more: object) -> list[str]:
    """Of a worker that ends with this process. `join`: the address where it joins, as `flags` and `more` options, such
    as `token_file`, have it."""
    options = {
        "name": spec.name,
        "join": join,
        "device": spec.device,
        "gpu_layers": spec.gpu_layers,
        "gpu_memory_bytes": spec.gpu_memory_bytes,
        "threads": spec.threads,
        "memory_bytes": spec.memory_bytes,
        "feature_level": spec.feature_level or None,
        "packed_cache_dir": spec.packed_cache_dir,
        "packed_cache_bytes": spec.packed_cache_bytes if spec.packed_cache_dir else None,
        "weights_dir": spec.weights_dir,
        "weights_bytes": spec.weights_bytes if spec.weights_dir else None,
        "kernels_dir": spec.kernels_dir,
        "parent_pid": os.getpid(),
        "log_format": spec.log_format,
        "cluster": spec.cluster or None,
        **more,
    }
    command = [sys.executable, "-P", "-m", "llamaclust.worker", *flags]
    for option, value in options.items():
        if value is not None:
            command += (f"--{option.replace('_', '-')}", str(value))
    return command


def worker_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """What a worker inherits: nothing that may hold a secret."""
    inherited = {
        name: value for name, value in variables.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    return inherited | {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's own threads, one a core otherwise, would only wait


def describe_exit(code: int) -> str:
    """How a process ended, from its return code as `subprocess` gives it."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    why = ", by someone or for lack of memory" if -code == signal.SIGKILL else ""
    return f"its process was killed by signal {-code} ({name}){why}"
