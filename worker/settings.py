"""What a worker process is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llamaclust.core.logs import LogFormat


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """`parent_pid`: the process with which this one ends, for workers that a launcher on this machine started.

    A `static` worker joins by itself: `join` is the enrolment address then, and `token_file` holds a join token.
    """

    name: str
    join: str  # gRPC target of the coordinator
    token_file: Path | None  # None: insecure
    listen: str = ""  # gRPC target of this worker's Stage service; port 0: any free one
    device: str = "cpu"  # "cpu" | "reference" | "cuda:N", or several of these with commas between
    threads: int | None = None  # None: one a core
    memory_bytes: int | None = None  # cap on weights, KV memory and workspace in RAM; None: what is free
    feature_level: str = ""  # "": the best there is
    join_s: float = 60.0  # how long to wait for the coordinator
    parent_pid: int | None = None
    packed_cache_dir: Path | None = None  # the packed-weight cache; None: none
    packed_cache_bytes: int = 0  # what they may take
    weights_dir: Path | None = None  # where weights fetched from other workers are kept; None: none are fetched
    weights_bytes: int = 0  # what they may take
    kernels_dir: Path | None = None  # where compiled kernels of GPUs are kept; None: nowhere
    static: bool = False
    advertise: str = ""  # HOST or HOST:PORT by which others reach it; "": as it listens
    log_format: LogFormat = LogFormat.TEXT
    cluster: str = ""  # its name, for the log; "": not known
    model_dir: Path | None = None  # where model files lie that are not where the coordinator has them
    gpu_layers: int | None = None  # of a stage on GPUs, its last ones; None: as many as these have memory for
    gpu_memory_bytes: int | None = None  # cap on what is taken of each GPU; None: what is free there
