"""`up`, `down`, `status`, `plan`, `drain`, `undrain`, `logs`: clusters from start to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llamaclust.cli.interrupts import ends_at_once
from llamaclust.cli.options import FileCommand, PlainCommand

ConfigFile = Annotated[Path | None, typer.Argument(metavar="FILE", help="Cluster file (YAML). Without it: the demo.")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key of the file.")]
ClusterName = Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="Which, where several run.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def up(
    file: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006  typer reads the default
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, metavar="N", help="Port of the HTTP API; 0: any free one.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", metavar="NAME", help="Or FILE: instead of the model's.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when the cluster is ready.")] = False,
    notify: Annotated[int | None, typer.Option("--notify", hidden=True)] = None,
    ranked: Annotated[bool, typer.Option("--ranked", hidden=True)] = False,
) -> None:
    """Start the cluster that FILE describes and serve its API until Ctrl-C."""
    with ends_at_once():
        from llamaclust.cli.up import run_cluster, template_of

    if chat_template is not None:
        overrides = [*overrides, f"chat_template={template_of(chat_template)}"]
    run_cluster(file, overrides, port, detach=detach, notify=notify, ranked=ranked)


def down(cluster: ClusterName = None) -> None:
    """Stop a running cluster: running requests are finished first, for a while."""
    from llamaclust.cli.status import stop

    stop(cluster)


def status(
    cluster: ClusterName = None,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again every second, until Ctrl-C.")] = False,
) -> None:
    """Show a running cluster: workers, layers, memory, requests, speed beside the predicted one."""
    from llamaclust.cli.status import show_status

    show_status(cluster, as_json, watch)


def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="A worker's name.")], cluster: ClusterName = None
) -> None:
    """Move a worker's layers to others without dropping a token, and give it none until `undrain`."""
    from llamaclust.cli.status import drain

    drain(cluster, worker)


def undrain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="A worker's name.")], cluster: ClusterName = None
) -> None:
    """Let a drained worker have layers again."""
    from llamaclust.cli.status import undrain

    undrain(cluster, worker)


def logs(
    worker: Annotated[
        str, typer.Argument(metavar="WORKER", help="A worker's name, or `coordinator` for a detached one.")
    ],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as the log grows.")] = False,
    cluster: ClusterName = None,
) -> None:
    """Print a worker's log."""
    from llamaclust.cli.status import print_log

    print_log(cluster, worker, follow)


def plan(file: ConfigFile = None, overrides: Overrides = [], as_json: Json = False) -> None:  # noqa: B006
    """Show which layers would go where, and how fast that will be, without starting anything."""
    from llamaclust.cli.plan import show_plan

    show_plan(file, overrides, as_json)


def register(app: typer.Typer) -> None:
    """Adds the commands of this file."""
    for command in (up, down, status, plan, drain, undrain, logs):
        app.command(cls=FileCommand if command in (up, plan) else PlainCommand)(command)
