"""`llamaclust model cache ...`: layers kept prepared on disk, so that the next start need not pack them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from llamaclust.cli.help import PlainCommand, PlainGroup
from llamaclust.cli.terminal import printable
from llamaclust.errors import LlamaclustError
from llamaclust.sizes import MIB

if TYPE_CHECKING:
    from llamaclust.kernels.cpu.prepared_files import PreparedFolder

app = typer.Typer(
    name="cache",
    cls=PlainGroup,
    help="List and delete layers that are kept on disk, prepared for the next start.",
    no_args_is_help=True,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list", cls=PlainCommand)
def list_layers(as_json: JsonOption = False) -> None:
    """Show of which models layers are kept prepared, how many, and what they take."""
    folder = _folder()
    found = folder.list_models()
    if as_json:
        models = [asdict(one) for one in found]
        print(json.dumps({"folder": str(folder.path), "most_bytes": folder.most_bytes, "models": models}))
        return
    for one in found:
        print(f"{one.size_bytes / MIB:10,.2f} MiB  {one.parts:4} parts  {printable(one.model)}")
    print(f"{folder.used_bytes() / MIB:10,.2f} MiB of {folder.most_bytes / MIB:,.2f} in {folder.path}")


@app.command(cls=PlainCommand)
def clear(as_json: JsonOption = False) -> None:
    """Delete all prepared layers. Processes that use them go on; the next start packs them anew."""
    folder = _folder()
    try:
        files, size_bytes = folder.clear()
    except OSError as error:
        raise LlamaclustError(f"{folder.path}: cannot be cleared: {error.strerror}") from error
    if as_json:
        print(json.dumps({"folder": str(folder.path), "files": files, "size_bytes": size_bytes}))
    else:
        print(f"{files} files, {size_bytes / MIB:,.2f} MiB deleted in {folder.path}")


def _folder() -> PreparedFolder:
    from llamaclust.cluster.config import environment
    from llamaclust.kernels.cpu.prepared_files import PreparedFolder

    variables = environment()
    return PreparedFolder(variables.prepared_dir, variables.prepared_bytes)
