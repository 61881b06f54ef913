"""`worker`: one worker on this machine joins a static cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llamaclust.cli.gpu_options import Devices, GpuLayers, Gpus
from llamaclust.cli.help import PlainCommand
from llamaclust.cli.interrupts import ends_at_once


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
        from llamaclust.cli import joining
    gpus = Gpus(tuple(device), gpu_layers, gpu_memory)
    settings = joining.settings(join, token_file, name, listen, advertise, gpus, threads, memory, model_dir, insecure)
    joining.work(settings)


def register(app: typer.Typer) -> None:
    """Adds the command of this file."""
    app.command(cls=PlainCommand)(worker)
