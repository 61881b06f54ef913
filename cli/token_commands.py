"""`llamaclust token ...`: the secret with which workers on other machines join."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llamaclust.cli.help import PlainCommand, PlainGroup

app = typer.Typer(name="token", cls=PlainGroup, help="The join token of a cluster over machines.", no_args_is_help=True)


@app.callback(cls=PlainGroup)
def _group() -> None:
    """The join token of a cluster over machines."""


@app.command("rotate", cls=PlainCommand)
def rotate(
    cluster: Annotated[str, typer.Option(metavar="NAME", help="`name` of the cluster file.")] = "default",
    trust_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="`join.trust_dir` of the cluster file, where it has one.")
    ] = None,
) -> None:
    """Put a new join token in the place of the old one, while the cluster runs or not, and print its file.

    With the old one nobody joins any more. Who is a member stays, and needs the new one to join again."""
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
        "copy it over the old one on every worker's machine: members stay, but whoever joins again needs it, so do all"
        " of them once the coordinator was restarted",
        file=sys.stderr,
    )
