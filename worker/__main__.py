"""`python -m llamaclust.worker`: how a launcher starts a worker process."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from llamaclust.core.logs import LogFormat
from llamaclust.wire.rpc.grpc_options import tune_grpc
from llamaclust.worker.settings import WorkerSettings

_OF_GPUS = ("--gpu-layers", "--gpu-memory-bytes")


def parse_settings(arguments: list[str]) -> WorkerSettings:
    """Options are the fields of WorkerSettings."""
    parser = argparse.ArgumentParser(prog="llamaclust.worker")
    for name in ("--name", "--join", "--listen", "--device", "--feature-level"):
        parser.add_argument(name, required=name in ("--name", "--join"))
    parser.add_argument("--token-file", type=Path, required=True)
    parser.add_argument("--static", action="store_true")
    for name in ("--packed-cache-dir", "--weights-dir", "--kernels-dir"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--log-format", type=LogFormat)
    parser.add_argument("--cluster")
    for name in ("--threads", "--memory-bytes", "--packed-cache-bytes", "--weights-bytes", "--parent-pid", *_OF_GPUS):
        parser.add_argument(name, type=int)
    parser.add_argument("--join-s", type=float)
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    assert given.keys() <= {field.name for field in fields(WorkerSettings)}
    return WorkerSettings(**given)


def main() -> None:
    settings = parse_settings(sys.argv[1:])
    tune_grpc()
    from llamaclust.worker.main import end_process, run_worker

    end_process(run_worker(settings))


if __name__ == "__main__":
    main()
