"""`model convert` and `model merge-lora`: from a checkpoint, and from an adapter on one, to a GGUF file."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from llamaclust.cli.help import PlainCommand
from llamaclust.cli.terminal import printable

TypeOption = Annotated[
    str, typer.Option("--type", "-t", metavar="TYPE", help="Type of the matrices: f32, f16, bf16 or q8_0.")
]


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Folder with config.json or params.json, TencentPretrain's .bin, or llama2.c's .bin.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="The file; NAME-TYPE.gguf here by default.")
    ] = None,
    kind: TypeOption = "f16",
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="PATH", help="Its tokenizer, where it is not beside it.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="TencentPretrain's configuration in JSON.")
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option(
            "--context-length", metavar="N", min=1, max=1 << 30, help="Tokens, where the checkpoint does not say."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="The model's name in the file.")] = None,
) -> None:
    """Write a checkpoint as a GGUF file. Needs no PyTorch and little memory, and runs nothing that a file holds."""
    from llamaclust.tools.convert.conversion import convert as run
    from llamaclust.tools.convert.formats.opening import Hints

    with _told("converting") as told:
        done = run(source, out, kind, Hints(tokenizer, config, context_length), told, name)
    for note in done.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    print(done.path)


def merge_lora(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The model: a folder of Hugging Face's form.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder that has adapter_config.json.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT", help="A name that ends in .gguf, or a folder to make.")
    ],
    kind: TypeOption = "f16",
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="PATH", help="Its tokenizer, where neither folder has it.")
    ] = None,
) -> None:
    """Add an adapter (LoRA, as PEFT saves it) to the weights of its model. Sums are computed in float32."""
    from llamaclust.tools.convert.formats.opening import Hints
    from llamaclust.tools.convert.merging import merge_adapter

    with _told("merging") as told:
        done = merge_adapter(base, adapter, out, kind, Hints(tokenizer=tokenizer), told)
    print(done.path)


@contextmanager
def _told(what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress on standard error; what is told to end tidies up first."""
    from llamaclust.cli.interrupts import heard_as_interrupts
    from llamaclust.cli.progress import shown_progress

    with heard_as_interrupts(signal.SIGTERM, signal.SIGHUP), shown_progress() as progress:
        yield lambda done_bytes, total_bytes: progress(what, done_bytes, total_bytes)


def register(model_app: typer.Typer) -> None:
    """Adds the commands of this file to `model`'s."""
    model_app.command(cls=PlainCommand)(convert)
    model_app.command("merge-lora", cls=PlainCommand)(merge_lora)
