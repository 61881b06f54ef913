"""Merges an adapter into its checkpoint: into a GGUF file or a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from llamaclust.core.errors import ModelFileError, UsageError
from llamaclust.model.gguf.atomic_file import hidden_name, new_file
from llamaclust.tools.convert.adapter import merged, read_adapter, words_of
from llamaclust.tools.convert.conversion import Converted, Target, thread_count, write_converted
from llamaclust.tools.convert.elements import OUTPUT_TYPES
from llamaclust.tools.convert.formats.checkpoint import Checkpoint
from llamaclust.tools.convert.formats.hugging_face import CONFIG, read_folder
from llamaclust.tools.convert.formats.opening import Hints
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.lazy import Lazy, Storage
from llamaclust.tools.convert.stream import OnProgress, Output, write_pieces

_TOKENIZER_FILES: Final = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_STORAGE: Final = {"f32": Storage.F32, "f16": Storage.F16, "bf16": Storage.BF16}


def merge_adapter(
    base: Path, adapter: Path, out: Path, type_name: str, hints: Hints, on_progress: OnProgress
) -> Converted:
    """Writes W + scale * B @ A of every matrix to `out`: a GGUF file where its name ends so, else a folder.

    The tokenizer is the adapter's where it has one. ModelFileError where the two do not fit together.
    """
    if not (base / CONFIG).is_file():
        raise ModelFileError(f"{base}: no {CONFIG}: the base must be a folder of Hugging Face's form, not quantized")
    with SourceFiles() as files:
        found = read_folder(files, base)
        tensors = merged(found.tensors, read_adapter(files, adapter))
        vocabulary = adapter if _has_tokenizer(adapter) else base
        whole = replace(found, tensors=tensors, settings=words_of(tensors, found.settings), vocabulary=vocabulary)
        if out.suffix == ".gguf":
            return write_converted(files, whole, Target(out, type_name), hints, on_progress)
        return _write_folder(files, whole, base, out, type_name, on_progress)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def _write_folder(
    files: SourceFiles, whole: Checkpoint, base: Path, out: Path, type_name: str, on_progress: OnProgress
) -> Converted:
    """config.json, the tokenizer's files and model.safetensors; the latter comes last."""
    if type_name not in _STORAGE:
        raise UsageError(f"--type {type_name}: a folder holds one of {', '.join(_STORAGE)}; q8_0 is for .gguf files")
    weights = out / "model.safetensors"
    if out.exists() and (not out.is_dir() or set(out.iterdir()) - {hidden_name(weights)}):
        raise UsageError(f"{out}: is there already; give a name that is not, or one that ends in .gguf")
    created = not out.exists()
    out.mkdir(exist_ok=True)
    made: list[Path] = []
    try:
        _write_weights(whole.tensors, weights, type_name, on_progress)
        made.append(weights)
        files.check_unchanged()
        for name in _TOKENIZER_FILES:
            source = whole.vocabulary / name if (whole.vocabulary / name).is_file() else base / name
            if source.is_file():
                made.append(out / name)
                shutil.copyfile(source, out / name)
        torch_type = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[type_name]
        values = {**whole.settings.values, "torch_dtype": torch_type}
        values.pop("quantization_config", None)  # weights are unpacked on the way
        made.append(out / CONFIG)
        made[-1].write_text(json.dumps(values, indent=2) + "\n")
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        if created and not any(out.iterdir()):
            out.rmdir()
        raise
    return Converted(out, whole.family, len(whole.tensors), ())


def _write_weights(tensors: Mapping[str, Lazy], path: Path, type_name: str, on_progress: OnProgress) -> None:
    kind, storage = OUTPUT_TYPES[type_name], _STORAGE[type_name]
    outputs = [Output(name, kind, tensor) for name, tensor in tensors.items() if tensor.storage.is_real]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in outputs:
        end = at + output.source.n_bytes
        header[output.name] = {"dtype": storage.name, "shape": list(output.tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with new_file(path, len(head) + at) as file:
        file.write(head)
        write_pieces(file, outputs, on_progress, thread_count(), alignment=1)
