"""`worker` joins a static cluster; `token` is the secret with which it does."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from llamaclust.cli.interrupts import ends_at_once
from llamaclust.cli.options import Devices, GpuLayers, Gpus, PlainCommand, PlainGroup, option_value
from llamaclust.core.errors import UsageError

if TYPE_CHECKING:
    from llamaclust.worker.settings import WorkerSettings


def worker(
    join: Annotated[str, typer.Option("--join", metavar="HOST:PORT", help="`join.listen` of the coordinator.")],
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="The join token, mode 0600. Default: join-token in the state directory.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="In the cluster. Default: this machine's.")] = None,
    listen: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="Where other members reach it. Default: any port, on the way to the coordinator."
        ),
    ] = "",
    advertise: Annotated[
        str, typer.Option(metavar="HOST[:PORT]", help="What they are told instead, as behind address translation.")
    ] = "",
    device: Devices = [],  # noqa: B006  typer reads the default
    gpu_layers: GpuLayers = "auto",
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", metavar="SIZE", help="Cap on what it takes of each GPU. Default: what is free."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, metavar="N", help="Default: one a core.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Cap on what it takes of RAM, as 8GiB. Default: what is free.")
    ] = None,
    model_dir: Annotated[
        Path | None,
        typer.Option(
            "--model-dir", metavar="DIR", help="Where the model's file is, if not where the coordinator has it."
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="No encryption and no authentication, for a cluster that is insecure too."),
    ] = False,
) -> None:
    """Join a static cluster with one worker on this machine, until the cluster ends."""
    with ends_at_once():
        from llamaclust.wire.rpc.grpc_options import tune_grpc

        tune_grpc()
    gpus = Gpus(tuple(device), gpu_layers, gpu_memory)
    settings = worker_settings(join, token_file, name, listen, advertise, gpus, threads, memory, model_dir, insecure)
    work(settings)


def register(app: typer.Typer) -> None:
    """Adds the command of this file."""
    app.command(cls=PlainCommand)(worker)


_TOKEN = "join-token"
_JOIN_S = 15.0


def worker_settings(
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
    from llamaclust.cluster.config.environment import environment
    from llamaclust.cluster.config.values import expand_home, parse_name, parse_size
    from llamaclust.cluster.launchers.worker_settings import with_caches
    from llamaclust.worker.settings import WorkerSettings

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
    from llamaclust.core.addresses import split_address

    split_address(value)
    return value


def _advertised(value: str) -> str:
    """HOST or HOST:PORT."""
    from llamaclust.core.addresses import split_address

    split_address(value if ":" in value.rpartition("]")[2] else f"{value}:0")
    return value


def _token_file(given: Path | None, state_dir: Path) -> Path:
    path = given or state_dir / _TOKEN
    if given is None and not path.exists():
        raise UsageError(f"--token-file: needed, since there is no {path}; `llamaclust up` prints where the token is")
    return path


token_app = typer.Typer(
    name="token", cls=PlainGroup, help="The join token of a cluster over machines.", no_args_is_help=True
)


@token_app.callback(cls=PlainGroup)
def _group() -> None:
    """The join token of a cluster over machines."""


@token_app.command("rotate", cls=PlainCommand)
def rotate(
    cluster: Annotated[str, typer.Option(metavar="NAME", help="`name` of the cluster file.")] = "default",
    trust_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="`join.trust_dir` of the cluster file, where it has one.")
    ] = None,
) -> None:
    """Put a new join token in the place of the old one, while the cluster runs or not, and print its file.

    The old one admits no worker any more. Members stay, and need the new one to rejoin."""
    from llamaclust.cluster.config.environment import environment
    from llamaclust.cluster.config.values import parse_name
    from llamaclust.cluster.membership.authority import Authority
    from llamaclust.core.errors import UsageError

    try:
        folder = trust_dir or environment().state_dir / parse_name(cluster) / "trust"
    except ValueError as error:
        raise UsageError(f"--cluster: {error}") from error
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; give the cluster's name by --cluster, or the folder by --trust-dir"
        )
    authority = Authority.open(folder)
    authority.rotate_token()
    print(authority.token_file)
    print(
        "copy it over the old one on every worker's machine: members stay, but workers that rejoin need it, as do all"
        " of them once the coordinator was restarted",
        file=sys.stderr,
    )
