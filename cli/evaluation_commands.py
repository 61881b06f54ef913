"""`model perplexity`: how well a model predicts a text, how far it is from another one, how often it chooses right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llamaclust.cli.gpu_options import Devices, GpuLayers, Gpus
from llamaclust.cli.help import PlainCommand
from llamaclust.cli.measure_commands import Json, KvTypeOption, ModelArgument, Threads, Workers, known_kv_type


def perplexity(
    model: ModelArgument,
    text: Annotated[Path | None, typer.Option("-f", "--file", metavar="TEXT", help="UTF-8 text to predict.")] = None,
    context: Annotated[
        int | None, typer.Option("-c", "--context", metavar="N", min=4, help="Tokens of a chunk; 512 by default.")
    ] = None,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, metavar="N", help="Only the first N.")] = None,
    base: Annotated[
        Path | None,
        typer.Option("--kl-divergence-base", metavar="FILE", help="Keep MODEL's logits there, or compare with them."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--kl-divergence", help="Compare MODEL with the logits in that FILE, on their text.")
    ] = False,
    hellaswag: Annotated[
        Path | None,
        typer.Option("--hellaswag", metavar="FILE", help="Choose endings: six lines a task, as llama.cpp has them."),
    ] = None,
    tasks: Annotated[int | None, typer.Option("--tasks", min=1, metavar="N", help="Only the first N of those.")] = None,
    threads: Threads = None,
    workers: Workers = 1,
    kv_type: KvTypeOption = None,
    device: Devices = [],  # noqa: B006  typer reads the default
    gpu_layers: GpuLayers = "auto",
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="Ask a running cluster that serves MODEL.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="File whose first line is the API key.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how well MODEL predicts a text, as llama.cpp's llama-perplexity does; less is better."""
    from llamaclust.cli import evaluating
    from llamaclust.tools.hub.catalog import resolve_model

    asked = evaluating.Asked(text, context, chunks, base, compare, hellaswag, tasks)
    asked.check()
    path, kv, gpus = resolve_model(model), known_kv_type(kv_type), Gpus(tuple(device), gpu_layers)
    source = evaluating.Source(path, threads, workers, kv, endpoint, api_key_file, gpus)
    evaluating.evaluate(source, asked, as_json)


def register(models: typer.Typer) -> None:
    """Adds the commands of this file to those of `model`."""
    models.command(cls=PlainCommand)(perplexity)
