"""A worker process's settings. Launchers pass them on unchanged, as JSON on standard input."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from llamaclust.core.logs import LogFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """One worker's settings. A `static` worker may also join a standby. Other workers end with their parent process."""

    name: str
    join: str = ""  # gRPC target of the coordinator. Set as soon as a launcher knows it.
    standbys: tuple[str, ...] = ()  # HOST:PORT of standby coordinators, for a static worker.
    discover: bool = False  # True to find coordinators by multicast DNS too. Needs a static worker with a token.
    token_file: Path | None = None
    token: str = field(default="", repr=False)  # The token itself, instead of `token_file`.
    listen: str = ""  # gRPC target of this worker's Stage service. Port 0 means any free port.
    link_port: int | None = None  # Port for links of groups. None derives it from the port of `listen`.
    device: str = "cpu"  # "cpu", "reference" or "cuda:N", or several GPUs like "cuda:0,cuda:1".
    threads: int | None = None  # None means one thread per core.
    numa_node: int | None = None  # The only NUMA node to use, or None for all nodes.
    memory_bytes: int | None = None  # Maximum of weights, KV memory and workspace in RAM, or None for all free memory.
    mlock: bool = False
    feature_level: str = ""  # "" means the best.
    join_s: float = 60.0  # Seconds to wait for the coordinator.
    search_s: float | None = None  # Seconds in which a static worker must become a member, or None for no limit.
    parent_pid: int | None = None
    packed_cache_dir: Path | None = None  # Cache of packed weights, or None for no cache.
    packed_cache_bytes: int = 0  # Maximum size of the cache of packed weights.
    weights_dir: Path | None = None  # Cache of weights fetched from other workers, or None to fetch no weights.
    weights_bytes: int = 0  # Maximum size of the cache of fetched weights.
    kernels_dir: Path | None = None  # Cache of compiled GPU kernels, or None for no cache.
    kv_disk_dir: Path | None = None
    kv_disk_bytes: int | None = None  # Maximum size of KV memory on disk, or None to keep none there.
    static: bool = False
    stays: bool = False  # True if a static worker waits for the next cluster when its cluster ends.
    # HOST or HOST:PORT at which other machines reach this worker, or "" for the address of `listen`.
    advertise: str = ""
    log_format: LogFormat = LogFormat.TEXT
    cluster: str = ""  # Name of the cluster in the log, or "" if unknown.
    ready_file: Path | None = None  # File that exists while the worker is ready, or None for no file.
    # Folder of model files that have another path here than on the coordinator's machine.
    model_dir: Path | None = None
    models_dir: Path | None = None  # Folder of downloaded models, each in a folder of its own.
    gpu_layers: int | None = None  # Number of a stage's last layers on GPUs, or None for as many as fit.
    gpu_memory_bytes: int | None = None  # Maximum memory of each GPU, or None for all free memory.

    def to_json(self) -> str:
        """Returns JSON that contains the secret token. It must be passed through a pipe and must not be logged."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerSettings:
        hints = get_type_hints(cls)
        return cls(**{name: _typed(hints[name], value) for name, value in json.loads(text).items()})


def _typed(hint: Any, value: Any) -> Any:
    if get_origin(hint) is tuple:
        return tuple(value)
    for kind in (Path, LogFormat):
        if value is not None and kind in (get_args(hint) or (hint,)):
            return kind(value)
    return value
