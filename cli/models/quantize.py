"""The commands `model quantize` and `model imatrix`, which write smaller models and importance matrices."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llamaclust.cli.options import Chunks, LocalModel, Threads
from llamaclust.core.errors import UsageError

if TYPE_CHECKING:
    from llamaclust.model.quant_types import QuantType
    from llamaclust.tools.quantize.mixes import Mix
    from llamaclust.tools.quantize.quantize import Change, Quantizing

Out = Annotated[
    list[str],
    Argument(
        metavar="OUT",
        default_factory=list,
        show_default=False,
        help="Output file. Default: MODEL-TYPE.gguf next to MODEL; for a downloaded model, in the current folder.",
    ),
]
Type = Annotated[str, Argument(metavar="TYPE", help="Type of the output, e.g. Q4_K_M or Q8_0.")]


def quantize(
    model: LocalModel,
    out: Out,
    type_name: Type,
    imatrix_file: Annotated[
        Path | None,
        Option("--imatrix", metavar="FILE", help="Importance matrix, written by `model imatrix` or llama-imatrix."),
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        Option(
            "--tensor-type", metavar="PATTERN=TYPE", help="Type of tensors whose name matches the pattern; repeatable."
        ),
    ] = None,
    output_tensor_type: Annotated[
        str | None, Option("--output-tensor-type", metavar="TYPE", help="Type of output.weight.")
    ] = None,
    token_embedding_type: Annotated[
        str | None, Option("--token-embedding-type", metavar="TYPE", help="Type of token_embd.weight.")
    ] = None,
    leave_output_tensor: Annotated[
        bool, Option("--leave-output-tensor", help="Keep the type of output.weight.")
    ] = False,
    pure: Annotated[bool, Option("--pure", help="Use one type for all matrices.")] = False,
    allow_requantize: Annotated[
        bool,
        Option("--allow-requantize", help="Accept weights that are already quantized; quality is lost a second time."),
    ] = False,
    keep_split: Annotated[
        bool, Option("--keep-split", help="Write as many output files as MODEL has files. Default: one file.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only print types and sizes.")] = False,
    threads: Threads = None,
) -> None:
    """Write a copy of MODEL with smaller quant types. Each tensor gets the type that llama-quantize would give it."""
    from llamaclust.cli.progress import shown_progress
    from llamaclust.model.gguf.atomic_file import part_paths
    from llamaclust.model.gguf.model_file import open_model
    from llamaclust.model.imatrix import read_imatrix
    from llamaclust.tools.quantize.quantize import plan_quantizing, write_quantized
    from llamaclust.tools.quantize.type_choice import MixChoice
    from llamaclust.worker.devices.cores import physical_cores

    if len(out) > 1:
        raise UsageError(f"too many names: {' '.join(out[1:])}; give MODEL, OUT and TYPE")
    if leave_output_tensor and output_tensor_type is not None:
        raise UsageError("--leave-output-tensor and --output-tensor-type contradict each other: give one of them")
    wishes = MixChoice(
        _mix(type_name),
        pure=pure,
        keep_output=leave_output_tensor,
        output_type=_kind(output_tensor_type, "--output-tensor-type"),
        embedding_type=_kind(token_embedding_type, "--token-embedding-type"),
        by_pattern=tuple(map(_pattern, tensor_type or [])),
    )
    file = open_model(model)
    importance = None if imatrix_file is None else read_imatrix(imatrix_file)
    for pattern, _ in wishes.by_pattern:
        if not any(pattern.search(name) for name in file.tensors):
            raise UsageError(f"--tensor-type {pattern.pattern}: no tensor name in {file.path} matches the pattern")
    job = plan_quantizing(file, wishes, importance, allow_requantize)
    if dry_run:
        _print_sizes(job)
        return
    path = _out(file.path, out[0] if out else None, wishes.mix.name, file.parts, keep_split)
    if (change := job.needing_importance) is not None:
        raise _without_importance(change, imatrix_file)
    with shown_progress() as progress:
        write_quantized(job, path, threads or physical_cores(), keep_split, progress)
    print(part_paths(path, len(file.parts) if keep_split else 1)[0])
    _print_sizes(job)


def imatrix(
    model: LocalModel,
    text: Annotated[Path, Option("-f", "--file", metavar="TEXT", help="Calibration text (UTF-8).")],
    out: Annotated[
        Path,
        Option("-o", "--output", metavar="FILE", help="Output file: GGUF, or the old format if the name ends in .dat."),
    ],
    context: Annotated[int, Option("-c", "--context", metavar="N", min=4, help="Number of tokens in a chunk.")] = 512,
    chunks: Chunks = None,
    process_output: Annotated[bool, Option("--process-output", help="Include data for output.weight.")] = False,
    threads: Threads = None,
) -> None:
    """Run MODEL over a text and write an importance matrix."""
    from llamaclust.cli.progress import shown_progress
    from llamaclust.model.imatrix import write_imatrix
    from llamaclust.model.loader import Model
    from llamaclust.tools.evaluate.perplexity import cut, read_text
    from llamaclust.tools.quantize.imatrix import collect
    from llamaclust.worker.devices.cores import physical_cores

    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"{out} is a folder, or is in a folder that does not exist; check the path")
    if out.exists() and any(source.exists() and out.samefile(source) for source in (model, text)):
        raise UsageError(f"{out} is also an input file; give the output another name")
    words = read_text(text)
    with Model.open(model) as loaded, shown_progress(counts_bytes=False) as progress:
        trained = loaded.hyperparameters.context_length
        if context > trained:
            raise UsageError(f"-c {context}: the model's context is {trained} tokens; give {trained} or less")
        parts = cut(loaded.tokenizer, words, context, chunks)
        write_imatrix(out, collect(loaded, parts, threads or physical_cores(), str(text), process_output, progress))
    print(out)


def _kind(name: str | None, option: str) -> QuantType | None:
    from llamaclust.kernels.cpu.quantize import QUANTIZED_TYPES

    found = next((kind for kind in QUANTIZED_TYPES if name is not None and kind.name == name.upper()), None)
    if found is None and name is not None:
        raise UsageError(f"{option} {name}: give one of {', '.join(kind.name for kind in QUANTIZED_TYPES)}")
    return found


def _mix(name: str) -> Mix:
    from llamaclust.tools.quantize.mixes import ALIASES, MIXES

    mix = MIXES.get(ALIASES.get(name.upper(), name.upper()))
    if mix is None:
        raise UsageError(f"type {name} is not known: give one of {', '.join(MIXES)}")
    return mix


def _pattern(text: str) -> tuple[re.Pattern[str], QuantType]:
    pattern, _, name = text.rpartition("=")
    kind = _kind(name, f"--tensor-type {pattern}=") if pattern else None
    if kind is None:
        raise UsageError(f"--tensor-type {text}: expected PATTERN=TYPE, as in attn_v=Q8_0")
    try:
        return re.compile(pattern), kind
    except re.error as error:
        raise UsageError(f"--tensor-type {text}: the pattern is not a regular expression: {error}") from error


def _out(source: Path, given: str | None, name: str, parts: tuple[Path, ...], keep_split: bool) -> Path:
    from llamaclust.cluster.config.catalog import made_beside
    from llamaclust.model.gguf.atomic_file import part_paths

    stem = re.sub(r"-\d{5}-of-\d{5}$", "", source.stem)
    out = made_beside(source, f"{stem}-{name}.gguf") if given is None else Path(given)
    if out.is_dir():
        raise UsageError(f"{out} is a folder; give the name of a file in it")
    for path in part_paths(out, len(parts) if keep_split else 1):
        if any(path.exists() and part.exists() and path.samefile(part) for part in parts):
            raise UsageError(f"{path} is the model itself; give the new file another name")
    return out


def _without_importance(change: Change, imatrix_file: Path | None) -> UsageError:
    what = f"{change.tensor.name} as {change.quant_type.name} needs an importance matrix"
    if imatrix_file is None:
        return UsageError(f"{what}: make one with `llamaclust model imatrix` and give it with --imatrix")
    return UsageError(f"{what}, but {imatrix_file} has no entry for it: make an importance matrix of this model")


def _print_sizes(job: Quantizing) -> None:
    from llamaclust.core.sizes import MIB
    from llamaclust.tools.quantize.quantize import sizes_by_type

    sizes = sizes_by_type(job)
    for (was, becomes), (tensors, before, after) in sizes.items():
        print(
            f"{was.name:>8} -> {becomes.name:8} {tensors:5} tensors {before / MIB:12,.2f} -> {after / MIB:12,.2f} MiB"
        )
    before, after = (sum(each[index] for each in sizes.values()) for index in (1, 2))
    weights = sum(change.tensor.rows * change.tensor.shape[-1] for change in job.changes)
    bits = f"{8 * before / weights:.2f} -> {8 * after / weights:.2f} bits a weight"
    print(f"{before / MIB:,.2f} -> {after / MIB:,.2f} MiB, {bits}")
