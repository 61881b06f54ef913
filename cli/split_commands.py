"""`model split` and `model merge`: a model in several files, and in one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamaclust.cli.help import PlainCommand
from llamaclust.cli.terminal import printable
from llamaclust.core.errors import UsageError

if TYPE_CHECKING:
    from llamaclust.tools.split import Part

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would be written.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Catalog name or path of a .gguf.")]


def split(
    model: ModelArgument,
    prefix: Annotated[
        Path | None,
        typer.Argument(metavar="PREFIX", help="Parts are PREFIX-00001-of-0000N.gguf; MODEL without .gguf by default."),
    ] = None,
    max_size: Annotated[
        str | None, typer.Option("--split-max-size", metavar="SIZE", help="Bytes of tensors a part, like 2GiB or 2G.")
    ] = None,
    max_tensors: Annotated[
        int | None, typer.Option("--split-max-tensors", metavar="N", min=1, help="Tensors a part; 128 by default.")
    ] = None,
    no_tensor_first: Annotated[
        bool, typer.Option("--no-tensor-first-split", help="Metadata alone in the first part.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Cut a model file into parts, as llama.cpp's llama-gguf-split does. Every tensor stays as it is."""
    from llamaclust.model.gguf.model_file import open_model
    from llamaclust.tools.hub.catalog import made_beside, resolve_model
    from llamaclust.tools.split import DEFAULT_TENSORS, SplitRules, plan_split

    if max_size is not None and max_tensors is not None:
        raise UsageError("--split-max-size and --split-max-tensors: give one of them")
    most_bytes = None if max_size is None else _size(max_size)
    path = resolve_model(model)
    rules = SplitRules(most_bytes, max_tensors or DEFAULT_TENSORS, no_tensor_first)
    _write(plan_split(open_model(path), prefix or made_beside(path, path.stem), rules), dry_run)


def merge(
    model: Annotated[str, typer.Argument(metavar="FIRST", help="The first part, NAME-00001-of-0000N.gguf.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The new file; NAME.gguf beside the parts by default.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Put the parts of a model together in one file. Every tensor stays as it is."""
    from llamaclust.model.gguf.model_file import open_model
    from llamaclust.tools.hub.catalog import made_beside, resolve_model
    from llamaclust.tools.split import plan_merge

    path = resolve_model(model)
    name = re.sub(r"-\d{5}-of-\d{5}\.gguf$", ".gguf", path.name)
    _write([plan_merge(open_model(path), out or made_beside(path, name))], dry_run)


def register(models: typer.Typer) -> None:
    """Adds the commands of this file to those of `model`."""
    models.command(cls=PlainCommand)(split)
    models.command(cls=PlainCommand)(merge)


def _size(text: str) -> int:
    """Bytes; M and G are powers of ten, as llama.cpp has them."""
    from llamaclust.cluster.config.values import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"--split-max-size: {error}") from error


def _write(parts: list[Part], dry_run: bool) -> None:
    from llamaclust.cli.progress import shown_progress
    from llamaclust.tools.split import write_parts

    if not dry_run:
        with shown_progress() as progress:
            write_parts(parts, progress)
    for part in parts:
        print(f"{printable(str(part.path))}  {len(part.tensors)} tensors, {part.n_bytes:,} bytes")
