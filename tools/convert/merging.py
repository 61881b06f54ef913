"""Merges a PEFT adapter (LoRA) into its base checkpoint. Low-rank factors change matrices of the base. Whole tensors of
the adapter replace tensors of the base. The result is a GGUF file or a Hugging Face folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError, UsageError
from llamaclust.model.checkpoints.peft import WEIGHTS, PeftSettings, check_rank, factor_name, plain_name
from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.checkpoints.storage import Storage
from llamaclust.model.gguf.atomic_file import hidden_name, new_file
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.conversion import Converted, Target, thread_count, write_converted
from llamaclust.tools.convert.formats.hugging_face import CONFIG, read_folder, read_weight_file
from llamaclust.tools.convert.formats.opening import Hints
from llamaclust.tools.convert.formats.source_files import SourceFiles
from llamaclust.tools.convert.lazy import Array, Lazy, as_floats
from llamaclust.tools.convert.quantized import KEPT_METHOD
from llamaclust.tools.convert.settings import Checkpoint
from llamaclust.tools.convert.stream import OUTPUT_TYPES, OnProgress, Output, write_pieces
from llamaclust.tools.convert.vocabularies.reading import NAMES
from llamaclust.tools.convert.vocabularies.templates import MORE_TEMPLATES

_NAMES: Final = (WEIGHTS, "adapter_model.bin")
_SAVED: Final = re.compile(r"(?P<module>.*?)(\.modules_to_save(\.default)?|\.original_module)?\.(?P<kind>weight|bias)")
_SETTINGS: Final = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_HEAD: Final = frozenset({"lm_head.weight"})
_STORAGE: Final = {"f32": Storage.F32, "f16": Storage.F16, "bf16": Storage.BF16}


def merge_adapter(
    base: Path, adapter: Path, out: Path, type_name: str, hints: Hints, on_progress: OnProgress
) -> Converted:
    """Writes the base to `out`, with W + scale * B @ A in place of each matrix W that the adapter changes. `out` is a
    GGUF file if its name ends in .gguf, and otherwise a folder. Raises ModelFileError if adapter and base do not
    match."""
    if not (base / CONFIG).is_file():
        raise ModelFileError(f"{base}: {CONFIG} is missing: the base must be a folder in Hugging Face's format")
    with SourceFiles() as files:
        found = read_folder(files, base)
        changes = _read_adapter(files, adapter)
        tensors = _merged(found.tensors, changes)
        settings = _merged_settings(found.settings, tensors, changes)
        vocabulary = hints.tokenizer or next((place for place in (adapter, base) if _tokenizer_files(place)), base)
        whole = replace(found, tensors=tensors, settings=settings, vocabulary=vocabulary)
        if out.suffix == ".gguf":
            return write_converted(files, whole, Target(out, type_name), hints, on_progress)
        return _write_folder(files, whole, base, out, type_name, on_progress)


def _tokenizer_files(place: Path) -> dict[str, Path]:
    """Returns the tokenizer files that exist, by their usual names. `place` is a folder or a single file."""
    if place.is_file():
        name = place.name if place.name in NAMES else f"tokenizer{'.json' if place.suffix == '.json' else '.model'}"
        return {name: place}
    return {name: place / name for name in NAMES if (place / name).is_file()}


def _write_folder(
    files: SourceFiles, whole: Checkpoint, base: Path, out: Path, type_name: str, on_progress: OnProgress
) -> Converted:
    """Writes model.safetensors, the tokenizer's files and config.json, in this order."""
    if type_name not in _STORAGE:
        raise UsageError(f"--type {type_name}: give one of {', '.join(_STORAGE)} for a folder; q8_0 is for .gguf files")
    if whole.settings.inner("quantization_config").values.get("quant_method") == KEPT_METHOD:
        advice = "can only be merged into a GGUF file; give a name ending in .gguf"
        raise UsageError(f"{out}: a base model with {KEPT_METHOD} weights {advice}")
    weights = out / "model.safetensors"
    if out.exists() and (not out.is_dir() or set(out.iterdir()) - {hidden_name(weights)}):
        raise UsageError(f"{out} already exists; give another name, or one that ends in .gguf")
    if not _tokenizer_files(whole.vocabulary):
        raise ModelFileError(f"{whole.vocabulary} has no tokenizer ({', '.join(NAMES)}); name one with --tokenizer")
    created = not out.exists()
    out.mkdir(exist_ok=True)
    made: list[Path] = []
    try:
        _write_weights(whole.tensors, weights, type_name, on_progress)
        made.append(weights)
        files.check_unchanged()
        for name, source in _copied(whole.vocabulary, base).items():
            if not (out / name).parent.exists():
                made.append((out / name).parent)
                made[-1].mkdir()
            made.append(out / name)
            shutil.copyfile(source, made[-1])
        torch_type = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[type_name]
        values = {**whole.settings.values, "torch_dtype": torch_type}
        values.pop("quantization_config", None)  # The written weights are not quantized.
        made.append(out / CONFIG)
        made[-1].write_text(json.dumps(values, indent=2) + "\n")
    except BaseException:
        for path in reversed(made):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        if created and not any(out.iterdir()):
            out.rmdir()
        raise
    return Converted(out, whole.family, len(whole.tensors), ())


def _copied(vocabulary: Path, base: Path) -> dict[str, Path]:
    """Returns the files to copy, by name. Settings and chat templates that `vocabulary` lacks come from `base`."""
    settings = {name: place / name for place in (base, vocabulary) for name in _SETTINGS if (place / name).is_file()}
    templates = {
        f"{MORE_TEMPLATES}/{path.name}": path
        for place in (base, vocabulary)
        for path in (place / MORE_TEMPLATES).glob("*.jinja")
    }
    return _tokenizer_files(vocabulary) | settings | templates


def _write_weights(tensors: Mapping[str, Lazy], path: Path, type_name: str, on_progress: OnProgress) -> None:
    kind, storage = OUTPUT_TYPES[type_name], _STORAGE[type_name]
    outputs = [Output(name, kind, tensor) for name, tensor in tensors.items() if tensor.storage.is_real]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in outputs:
        end = at + output.n_bytes
        header[output.name] = {"dtype": storage.name, "shape": list(output.tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with new_file(path, len(head) + at) as file:
        file.write(head)
        write_pieces(file, outputs, on_progress, thread_count(), alignment=1)


@dataclass(frozen=True, slots=True)
class _Factors:
    """An adapter's change to a matrix: scale * left [rows, rank] @ right [rank, columns]. If `exchanged`, the product
    is transposed."""

    left: NDArray[np.float32]
    right: NDArray[np.float32]
    scale: np.float32
    exchanged: bool

    @property
    def shape(self) -> tuple[int, int]:
        shape = self.left.shape[0], self.right.shape[1]
        return shape[::-1] if self.exchanged else shape

    def added(self, start: int, end: int) -> NDArray[np.float32]:
        if self.exchanged:
            return (self.right[:, start:end].T @ self.left.T) * self.scale
        return (self.left[start:end] @ self.right) * self.scale


@dataclass(frozen=True, slots=True)
class _Adapter:
    path: Path
    factors: Mapping[str, _Factors]
    replaced: Mapping[str, Lazy]


def _read_adapter(files: SourceFiles, folder: Path) -> _Adapter:
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: not a folder; give the folder that has adapter_config.json")
    settings = PeftSettings.read(folder)
    weights = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if weights is None:
        raise ModelFileError(f"{folder} has no weights: expected {' or '.join(_NAMES)}")
    halves: dict[str, dict[str, Lazy]] = {}
    replaced = {}
    for name, tensor in read_weight_file(files, weights).items():
        plain = plain_name(name)
        if found := factor_name(plain):
            module, kind = found
            halves.setdefault(module, {})[kind] = tensor
        elif (saved := _SAVED.fullmatch(plain)) and "original_module" not in plain:
            replaced[f"{saved['module']}.{saved['kind']}"] = tensor
        elif not saved:
            raise ModelFileError(f"{tensor.origin}: the tensor is neither a LoRA factor nor a weight")
    factors = {f"{module}.weight": _factors(module, pair, settings) for module, pair in halves.items()}
    return _Adapter(weights, factors, replaced)


def _factors(module: str, pair: Mapping[str, Lazy], settings: PeftSettings) -> _Factors:
    kinds = set(pair)
    if kinds not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        origin = next(iter(pair.values())).origin
        raise ModelFileError(f"{origin}: {shown(module)} needs two factors, but has only {', '.join(sorted(kinds))}")
    of_embedding = "embedding_A" in pair
    left, right = (pair["embedding_B"], pair["embedding_A"]) if of_embedding else (pair["B"], pair["A"])
    if len(left.shape) != 2 or len(right.shape) != 2 or left.shape[1] != right.shape[0]:
        raise ModelFileError(f"{left.origin}: B {list(left.shape)} and A {list(right.shape)} do not fit together")
    scaling = settings.scaling(module)
    check_rank(scaling, left.shape[1], left.origin)
    exchanged = of_embedding or settings.settings.flag("fan_in_fan_out")
    return _Factors(left.floats(), right.floats(), np.float32(scaling.factor), exchanged)


def _merged(tensors: Mapping[str, Lazy], adapter: _Adapter) -> dict[str, Lazy]:
    found = dict(tensors)
    for name, tensor in adapter.replaced.items():
        found[name] = _replacement(tensor, found.get(name), name)
    for name, factors in adapter.factors.items():
        base = found.get(name)
        if base is None:
            raise ModelFileError(
                f"{adapter.path}: the base has no tensor {shown(name)}, so the adapter belongs to another model"
            )
        if base.shape != factors.shape:
            shapes = f"expected shape {list(base.shape)} as in the base, found {list(factors.shape)}"
            raise ModelFileError(f"{adapter.path}: {shown(name)}: {shapes}, so the adapter belongs to another model")
        found[name] = _added(base, factors)
    return found


def _replacement(tensor: Lazy, base: Lazy | None, name: str) -> Lazy:
    """Checks a tensor that replaces a tensor of the base. The number of rows may differ, because of added tokens."""
    if base is None and not name.startswith("lm_head"):
        raise ModelFileError(
            f"{tensor.origin}: the base has no tensor {shown(name)}, so the adapter belongs to another model"
        )
    if base is not None and tensor.shape[1:] != base.shape[1:]:
        shapes = f"expected shape {list(base.shape)} as in the base, found {list(tensor.shape)}"
        raise ModelFileError(f"{tensor.origin}: {shapes}, so the adapter belongs to another model")
    return tensor


def _added(base: Lazy, factors: _Factors) -> Lazy:
    def read(start: int, end: int) -> Array:
        values: Array = as_floats(base.read(start, end), base.storage) + factors.added(start, end)
        return values

    return Lazy(base.shape, Storage.F32, read, base.origin)


def _merged_settings(settings: Settings, tensors: Mapping[str, Lazy], adapter: _Adapter) -> Settings:
    embedding = tensors.get("model.embed_tokens.weight")
    changed: dict[str, Any] = dict(settings.values)
    if embedding is not None and settings.values.get("vocab_size") != embedding.shape[0]:
        changed["vocab_size"] = embedding.shape[0]
    if not _HEAD.isdisjoint((*adapter.replaced, *adapter.factors)):
        changed["tie_word_embeddings"] = False  # Otherwise, the embedding would be used instead of the adapter's head.
    return Settings(changed, settings.origin)
