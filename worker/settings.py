"""A worker process's settings. Launchers pass them on unchanged, as JSON on standard input."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from llamaclust.core.logs import LogFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """One worker's settings. The worker ends with its parent, `parent_pid`. A `static` worker enrols at `join` and
    `standbys` with its join token. It is insecure without a token, and needs no `join` with `discover`."""

    name: str
    join: str = ""  # gRPC target of the coordinator; set when a launcher knows it
    standbys: tuple[str, ...] = ()  # HOST:PORT; only of a static worker
    discover: bool = False  # by multicast DNS, besides `join` and `standbys`; only of a static worker with a token
    token_file: Path | None = None
    token: str = field(default="", repr=False)  # in place of a file
    listen: str = ""  # gRPC target of this worker's Stage service; port 0: any free one
    link_port: int | None = None  # for links of groups; None: beside that of `listen`, if it has one
    device: str = "cpu"  # "cpu" | "reference" | "cuda:N", or several of these with commas between
    threads: int | None = None  # None: one a core
    numa_node: int | None = None  # the only one whose cores and memory are used; None: all
    memory_bytes: int | None = None  # cap on weights, KV memory and workspace in RAM; None: what is free
    mlock: bool = False  # packed weights are locked in RAM
    feature_level: str = ""  # "": the best there is
    join_s: float = 60.0  # how long to wait for the coordinator
    parent_pid: int | None = None
    packed_cache_dir: Path | None = None  # cache of packed weights; None: none
    packed_cache_bytes: int = 0  # its size
    weights_dir: Path | None = None  # cache of weights fetched from other workers; None: none are fetched
    weights_bytes: int = 0  # its size
    kernels_dir: Path | None = None  # cache of compiled GPU kernels; None: none
    kv_disk_dir: Path | None = None  # folder for KV memory on disk
    kv_disk_bytes: int | None = None  # its size; None: KV memory is not kept on disk
    static: bool = False
    stays: bool = False  # after the end of a cluster, for the next one; only of a static worker
    advertise: str = ""  # HOST or HOST:PORT by which others reach it; "": as it listens
    log_format: LogFormat = LogFormat.TEXT
    cluster: str = ""  # its name, for the log; "": unknown
    ready_file: Path | None = None  # exists while the worker has settled; None: not wanted
    model_dir: Path | None = None  # folder of model files that are not where the coordinator has them
    models_dir: Path | None = None  # where this machine's downloaded models are, each in a folder of its own
    gpu_layers: int | None = None  # of a stage on GPUs, its last ones; None: as many as fit
    gpu_memory_bytes: int | None = None  # cap on what is taken of each GPU; None: what is free there

    def to_json(self) -> str:
        """Returns JSON with the secret token. It is for a pipe, and must not be logged."""
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
