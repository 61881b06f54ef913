"""The `llamaclust` command put together from its groups."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llamaclust.cli import bench, cache, cluster, convert, generate, model, quantize, worker
from llamaclust.cli.options import PlainGroup
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
cluster.register(app)
worker.register(app)
app.add_typer(worker.token_app, name="token")
generate.register(app)
bench.register(app)
convert.register(model.app)
model.app.add_typer(cache.app, name="cache")
quantize.register(model.app)
app.add_typer(model.app, name="model")
