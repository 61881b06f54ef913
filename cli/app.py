"""The `llamaclust` command put together from its groups."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llamaclust.cli import (
    cache_commands,
    cluster_commands,
    convert_commands,
    evaluation_commands,
    generate_commands,
    measure_commands,
    model_commands,
    quantize_commands,
    split_commands,
    token_commands,
    worker_commands,
)
from llamaclust.cli.help import PlainGroup
from llamaclust.core.version import VERSION

BadUsage: type[Any] = typer.BadParameter.__mro__[1]
"""The base of all mistakes on a command line, whose name is no part of typer's interface."""


def _print_version(asked: bool) -> None:
    if asked:
        print(f"llamaclust {VERSION}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Runs one language model on several machines: the same tokens however the cluster is cut."""


app = typer.Typer(
    name="llamaclust",
    cls=PlainGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback(cls=PlainGroup)(_options)
cluster_commands.register(app)
worker_commands.register(app)
app.add_typer(token_commands.app, name="token")
generate_commands.register(app)
measure_commands.register(app)
evaluation_commands.register(model_commands.app)
split_commands.register(model_commands.app)
model_commands.app.add_typer(cache_commands.app, name="cache")
quantize_commands.register(model_commands.app)
convert_commands.register(model_commands.app)
app.add_typer(model_commands.app, name="model")
