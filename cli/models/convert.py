"""The commands `model convert`, `merge-lora`, `split` and `merge`, which make model files from other files."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llamaclust.cli.options import LocalModel, model_file, option_value
from llamaclust.cli.terminal import printable
from llamaclust.core.errors import UsageError

if TYPE_CHECKING:
    from llamaclust.tools.split import Part

DryRun = Annotated[bool, Option("--dry-run", help="Only show what would be written.")]
TypeOption = Annotated[
    str, Option("--type", "-t", metavar="TYPE", help="Type of the matrices: f32, f16, bf16 or q8_0.")
]


def convert(
    source: Annotated[
        Path,
        Argument(
            metavar="SRC",
            help="A folder with config.json or params.json, or a .bin file of TencentPretrain or llama2.c.",
        ),
    ],
    out: Annotated[
        Path | None,
        Option("--out", "-o", metavar="FILE", help="Output file. Default: NAME-TYPE.gguf in the current folder."),
    ] = None,
    kind: TypeOption = "f16",
    tokenizer: Annotated[
        Path | None,
        Option("--tokenizer", metavar="PATH", help="Tokenizer file or its folder. Needed if none is next to SRC."),
    ] = None,
    config: Annotated[
        Path | None, Option("--config", metavar="FILE", help="TencentPretrain's configuration in JSON.")
    ] = None,
    context_length: Annotated[
        int | None,
        Option(
            "--context-length",
            metavar="N",
            min=1,
            max=1 << 30,
            help="Context length in tokens, for checkpoints that do not state it.",
        ),
    ] = None,
    name: Annotated[str | None, Option("--name", metavar="NAME", help="Model name to write into the file.")] = None,
) -> None:
    """Convert a checkpoint to a GGUF file, without PyTorch and without running code of the checkpoint."""
    from llamaclust.tools.convert.conversion import convert as run
    from llamaclust.tools.convert.formats.opening import Hints

    with _progress("converting") as progress:
        done = run(source, out, kind, Hints(tokenizer, config, context_length), progress, name)
    for note in done.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    print(done.path)


def merge_lora(
    base: Annotated[Path, Argument(metavar="BASE", help="Folder of the model, in Hugging Face's format.")],
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="Folder of the adapter, with adapter_config.json.")],
    out: Annotated[
        Path, Option("--out", "-o", metavar="OUT", help="Output: a GGUF file if the name ends in .gguf, else a folder.")
    ],
    kind: TypeOption = "f16",
    tokenizer: Annotated[
        Path | None,
        Option(
            "--tokenizer",
            metavar="PATH",
            help="File or folder of the tokenizer. Needed if BASE and ADAPTER contain no tokenizer.",
        ),
    ] = None,
) -> None:
    """Merge a LoRA adapter of PEFT into its model. Sums are computed in float32."""
    from llamaclust.tools.convert.formats.opening import Hints
    from llamaclust.tools.convert.merging import merge_adapter

    with _progress("merging") as progress:
        done = merge_adapter(base, adapter, out, kind, Hints(tokenizer=tokenizer), progress)
    print(done.path)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    from llamaclust.cli.interrupts import signals_as_interrupts
    from llamaclust.cli.progress import shown_progress

    with signals_as_interrupts(signal.SIGTERM, signal.SIGHUP), shown_progress() as show:
        yield lambda done_bytes, total_bytes: show(what, done_bytes, total_bytes)


def split(
    model: LocalModel,
    prefix: Annotated[
        Path | None, Argument(metavar="PREFIX", help="Prefix of the parts' names. Default: MODEL without .gguf.")
    ] = None,
    max_size: Annotated[
        str | None,
        Option("--split-max-size", metavar="SIZE", help="Maximum size of the tensors in a part, e.g. 2GiB or 2G."),
    ] = None,
    max_tensors: Annotated[
        int | None,
        Option("--split-max-tensors", metavar="N", min=1, help="Maximum number of tensors in a part. Default: 128."),
    ] = None,
    no_tensor_first: Annotated[
        bool, Option("--no-tensor-first-split", help="Write no tensors to the first part, only metadata.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Split a model file into parts, as llama.cpp's llama-gguf-split does. Tensors are unchanged."""
    from llamaclust.cluster.config.catalog import made_beside
    from llamaclust.cluster.config.values import parse_size
    from llamaclust.model.gguf.model_file import open_model
    from llamaclust.tools.split import DEFAULT_TENSORS, SplitRules, plan_split

    if max_size is not None and max_tensors is not None:
        raise UsageError("--split-max-size and --split-max-tensors: give one of them")
    most_bytes = None if max_size is None else option_value("--split-max-size", parse_size, max_size)
    rules = SplitRules(most_bytes, max_tensors or DEFAULT_TENSORS, no_tensor_first)
    _write(plan_split(open_model(model), prefix or made_beside(model, model.stem), rules), dry_run)


def merge(
    model: Annotated[Path, Argument(metavar="FIRST", parser=model_file, help="First part, NAME-00001-of-0000N.gguf.")],
    out: Annotated[
        Path | None, Argument(metavar="OUT", help="Output file. Default: NAME.gguf in the parts' folder.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Merge the parts of a model into one file. Tensors are unchanged."""
    from llamaclust.cluster.config.catalog import made_beside
    from llamaclust.model.gguf.model_file import open_model
    from llamaclust.tools.split import plan_merge

    name = re.sub(r"-\d{5}-of-\d{5}\.gguf$", ".gguf", model.name)
    _write([plan_merge(open_model(model), out or made_beside(model, name))], dry_run)


def _write(parts: list[Part], dry_run: bool) -> None:
    from llamaclust.cli.progress import shown_progress
    from llamaclust.tools.split import write_parts

    if not dry_run:
        with shown_progress() as progress:
            write_parts(parts, progress)
    for part in parts:
        print(f"{printable(str(part.path))}  {len(part.tensors)} tensors, {part.n_bytes:,} bytes")
