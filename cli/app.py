"""The `llamaclust` command and its groups of commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from llamaclust.cli import cache, chaos, cluster, generate, keys, why, worker
from llamaclust.cli.models import convert, model, quantize
from llamaclust.cli.options import FileCommand, PlainCommand, PlainGroup
from llamaclust.cli.speed import bench, measure
from llamaclust.core.version import VERSION


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"llamaclust {VERSION}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Declares the program's own options."""


_FIRST_STEPS = (
    "To start, run `llamaclust up`, then `llamaclust chat` in another terminal. "
    "`llamaclust plan --assume 3x16GB` lists the models that three machines with 16 GB can run."
)


def _group(name: str, text: str, commands: dict[str, Callable[..., None]], epilog: str | None = None) -> typer.Typer:
    group = typer.Typer(
        name=name,
        help=text,
        epilog=epilog,
        cls=PlainGroup,
        no_args_is_help=True,
        add_completion=name == "llamaclust",
        pretty_exceptions_enable=False,
    )
    for word, command in commands.items():
        group.command(word, cls=FileCommand if word in ("up", "plan", "measure") else PlainCommand)(command)
    return group


_cache = _group(
    "cache",
    "List and clear the packed-weight cache, fetched weights, compiled kernels and KV memory on disk.",
    {"list": cache.list_layers, "clear": cache.clear},
)
_model = _group(
    "model",
    "Download, inspect, convert, quantize and evaluate model files.",
    {
        "pull": model.pull,
        "list": model.list_models,
        "rm": model.remove,
        "info": model.info,
        "tokenize": model.tokenize,
        "perplexity": model.perplexity,
        "split": convert.split,
        "merge": convert.merge,
        "convert": convert.convert,
        "merge-lora": convert.merge_lora,
        "quantize": quantize.quantize,
        "imatrix": quantize.imatrix,
    },
)
_model.add_typer(_cache)
_commands = (
    *(cluster.up, cluster.down, cluster.status, cluster.plan, cluster.drain, cluster.undrain, cluster.logs),
    *(why.why, worker.worker, generate.generate, generate.chat, bench.bench, measure.measure, chaos.chaos),
)
app = _group(
    "llamaclust",
    "Run one large language model across several machines. Output is bit-identical however the model is split.",
    {command.__name__: command for command in _commands},
    _FIRST_STEPS,
)
app.callback(cls=PlainGroup)(_options)
app.add_typer(_group("token", "The join token of a static cluster.", {"rotate": worker.rotate}))
app.add_typer(_group("keys", "Keys of the HTTP API.", {"add": keys.add, "list": keys.list_keys, "rm": keys.remove}))
app.add_typer(_model)
