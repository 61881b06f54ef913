"""Converts a checkpoint to a GGUF file: reads tensors, renames them, adds the vocabulary, and writes the file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llamaclust.core.errors import UsageError
from llamaclust.model.gguf.header import MAGIC
from llamaclust.model.gguf.writer import WritableValue
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.convert.converters import convert_checkpoint
from llamaclust.tools.convert.formats.opening import Hints, open_checkpoint
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.lazy import Lazy
from llamaclust.tools.convert.settings import Checkpoint
from llamaclust.tools.convert.stream import OUTPUT_TYPES, OnProgress, Output, write_stream
from llamaclust.tools.convert.vocabularies.families import vocabulary_of

FILE_TYPES: Final = {QuantType.F32: 0, QuantType.F16: 1, QuantType.Q8_0: 7, QuantType.BF16: 32}
"""Maps the type of most weights to llama.cpp's value of the GGUF key `general.file_type`."""
_MXFP4_EXPERTS: Final = 38
_QUANTIZATION_VERSION: Final = 2
_EXACT: Final = re.compile(
    r".*_norm(_2)?\.weight|blk\.\d+\.ffn_gate_inp(_shexp)?\.weight|position_embd\.weight|rope_.*|.*\.bias"
    r"|.*\.(ssm_conv1d(_[qkv])?|shortconv\.conv)\.weight|.*\.ssm_[ad]|.*\.altup_.*"
)
"""Matches names of small tensors with a large effect on answers. Every file stores these tensors in float32."""
_MOST_THREADS: Final = 8


@dataclass(frozen=True, slots=True)
class Converted:
    path: Path
    architecture: str
    tensors: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Target:
    path: Path | None  # None for NAME-TYPE.gguf in the current folder.
    type_name: str  # A key of OUTPUT_TYPES.
    name: str | None = None  # Name of the model. None for the checkpoint's name.


def convert(
    source: Path, out: Path | None, type_name: str, hints: Hints, on_progress: OnProgress, name: str | None
) -> Converted:
    """Converts the checkpoint at `source` and writes it to `out`, or to NAME-TYPE.gguf in the current folder if `out`
    is None. Raises ModelFileError for a bad checkpoint, and UsageError for a bad option or a full disk. After an error,
    no file is left."""
    with SourceFiles() as files:
        return write_converted(
            files, open_checkpoint(files, source, hints), Target(out, type_name, name), hints, on_progress
        )


def write_converted(
    files: SourceFiles, checkpoint: Checkpoint, target: Target, hints: Hints, on_progress: OnProgress
) -> Converted:
    kind = OUTPUT_TYPES.get(target.type_name)
    if kind is None:
        raise UsageError(f"--type {target.type_name}: give one of {', '.join(OUTPUT_TYPES)}")
    model = convert_checkpoint(checkpoint)
    rows = model.tensors["token_embd.weight"].shape[0]
    words = vocabulary_of(model.vocabulary_rules, files, hints.tokenizer or checkpoint.vocabulary, rows)
    name = target.name or checkpoint.name
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    path = target.path or Path(f"{stem}-{target.type_name}.gguf")
    outputs = [Output(key, output_type(key, tensor, kind), tensor) for key, tensor in model.tensors.items()]
    general: dict[str, WritableValue] = {
        "general.architecture": model.architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _file_type(outputs, kind),
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    metadata = general | model.metadata | words.metadata()
    _check_replaceable(path)
    write_stream(path, metadata, outputs, on_progress, thread_count(), files.check_unchanged)
    return Converted(path, model.architecture, len(outputs), (*model.notes, *words.notes))


def _file_type(outputs: Sequence[Output], kind: QuantType) -> int:
    has_blocks = any(output.tensor.packed is QuantType.MXFP4 for output in outputs)
    return _MXFP4_EXPERTS if has_blocks and kind is not QuantType.Q8_0 else FILE_TYPES[kind]


def _check_replaceable(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start not in (b"", MAGIC):
        raise UsageError(f"{path} already exists and is not a model file; give another name")


def thread_count() -> int:
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def output_type(name: str, tensor: Lazy, wanted: QuantType) -> QuantType:
    """Returns a tensor's type in the file. Vectors and names that match `_EXACT` get F32. Most others get `wanted`."""
    if tensor.packed is not None:
        return tensor.packed
    if len(tensor.shape) == 1 or _EXACT.fullmatch(name):
        return QuantType.F32
    return wanted if tensor.shape[-1] % wanted.info.block_size == 0 else QuantType.F16
