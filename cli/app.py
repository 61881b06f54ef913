"""The `llamaclust` command put together from its groups."""

from __future__ import annotations

from typing import Any

import typer

from llamaclust.cli import cluster_commands, generate_commands, measure_commands, model_commands

BadUsage: type[Any] = typer.BadParameter.__mro__[1]
"""The base of all mistakes on a command line, whose name is no part of typer's interface."""

app = typer.Typer(
    name="llamaclust",
    help="Runs one language model on several machines: the same tokens however the cluster is cut.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cluster_commands.register(app)
generate_commands.register(app)
measure_commands.register(app)
model_commands.app.command("perplexity")(measure_commands.perplexity)
app.add_typer(model_commands.app, name="model")
