"""Reads a PEFT folder as a GGUF adapter. Tensors get GGUF names, but their bytes stay in the PEFT file."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.modules import PAIRED, matrix_name
from llamaclust.model.checkpoints.peft import CONFIG, WEIGHTS, PeftSettings, check_rank, factor_name, plain_name
from llamaclust.model.checkpoints.safetensors import StoredTensor, read_safetensors
from llamaclust.model.checkpoints.source_file import SourceFile
from llamaclust.model.checkpoints.storage import Storage
from llamaclust.model.gguf.header import Header
from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.tensors import FileIdentity, Tensor, open_regular
from llamaclust.model.gguf.values import MetadataValue, fail_at, shown
from llamaclust.model.model_keys import read_architecture, read_hyperparameters
from llamaclust.model.quant_types import QuantType

_TYPES: Final = {Storage.F32: QuantType.F32, Storage.F16: QuantType.F16, Storage.BF16: QuantType.BF16}
_MERGE: Final = "remove the adapter, or merge it with `llamaclust model merge-lora`"


def is_peft(path: Path) -> bool:
    return path.name == WEIGHTS or (path / CONFIG).is_file()


def peft_files(path: Path) -> tuple[Path, Path]:
    folder = path.parent if path.name == WEIGHTS else path
    return folder / CONFIG, folder / WEIGHTS


def read_peft(path: Path, model: ModelFile) -> Header:
    """Returns a GGUF header for the PEFT adapter. The header's path is the path of the PEFT weights. Raises
    ModelFileError unless the adapter changes only layer matrices, from W to W + factor * B @ A."""
    _, weights = peft_files(path)
    settings = PeftSettings.read(weights.parent)
    if settings.settings.values.get("modules_to_save"):
        raise settings.settings.error("modules_to_save", f"whole matrices are not supported; {_MERGE}")
    with open_regular(weights) as descriptor:
        identity = FileIdentity.of(descriptor)
        stored = read_safetensors(SourceFile(weights, descriptor, identity.size_bytes))
    reader = _Reader(model, settings, weights, identity)
    tensors: dict[str, Tensor] = {}
    for tensor in map(reader.tensor, stored):
        if tensor.name in tensors:
            raise fail_at(weights, f"tensor {shown(tensor.name)}", "the file has it under two names", _MERGE)
        tensors[tensor.name] = tensor
    metadata: dict[str, MetadataValue] = {
        "general.architecture": reader.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": reader.alpha(),
    }
    digest = sha256(repr((sorted(metadata.items()), stored)).encode()).digest()
    return Header(weights, identity, metadata, tensors, digest)


class _Reader:
    def __init__(self, model: ModelFile, settings: PeftSettings, weights: Path, identity: FileIdentity) -> None:
        self.architecture = read_architecture(model)
        self._model = model
        self._settings = settings
        self._weights = weights
        self._identity = identity
        self._alphas: dict[float, str] = {}  # Each alpha that occurs, with the name of one module that has it.

    def tensor(self, stored: StoredTensor) -> Tensor:
        place = f"tensor {shown(stored.name)}"
        found = factor_name(plain_name(stored.name))
        module, kind = found or ("", "")
        name = matrix_name(self.architecture, module)
        if name is None or kind not in ("A", "B"):
            what = f"adapters of {self.architecture} cannot change this module"
            raise fail_at(self._weights, place, what, _MERGE)
        if stored.storage not in _TYPES:
            known = ", ".join(kind.name for kind in _TYPES)
            raise fail_at(self._weights, place, f"expected type {known}, found {stored.storage.name}", _MERGE)
        self._check_scaling(stored, module, kind)
        half = f"{name}.weight.lora_{kind.lower()}"
        kind_of_it = _TYPES[stored.storage]
        heads = self._paired_heads(name, stored) if kind == "B" else 0
        n_bytes = kind_of_it.tensor_bytes(stored.shape)
        return Tensor(
            half, kind_of_it, stored.shape, self._weights, stored.offset, n_bytes, self._identity, paired_heads=heads
        )

    def alpha(self) -> float:
        """Returns the alpha of all modules as float32. Raises ModelFileError if modules have different alphas."""
        if len(self._alphas) > 1:
            one, other = list(self._alphas.items())[:2]
            both = f"{one[0]:g} for {shown(one[1])} and {other[0]:g} for {shown(other[1])}"
            raise self._settings.settings.error("lora_alpha", f"different values are not supported: {both}; {_MERGE}")
        return float(np.float32(next(iter(self._alphas), 0.0)))

    def _check_scaling(self, stored: StoredTensor, module: str, kind: str) -> None:
        origin = f"{self._weights}: tensor {shown(stored.name)}"
        if len(stored.shape) != 2 or 0 in stored.shape:
            raise ModelFileError(f"{origin}: expected a matrix, found shape {list(stored.shape)}; {_MERGE}")
        scaling = self._settings.scaling(module)
        check_rank(scaling, stored.shape[0 if kind == "A" else 1], origin)
        if np.float32(scaling.plain_alpha) <= 0:  # In GGUF, an alpha of 0 means that factors are not scaled.
            what = f"expected more than 0 (also in float32), found {scaling.alpha:g}"
            raise self._settings.settings.error("lora_alpha", what)
        self._alphas.setdefault(scaling.plain_alpha, module)

    def _paired_heads(self, name: str, stored: StoredTensor) -> int:
        """Returns the number of heads if GGUF interleaves the rows of matrix `name`, and otherwise 0."""
        part = name.rpartition(".")[2]
        if self.architecture not in PAIRED or part not in ("attn_q", "attn_k"):
            return 0
        sizes = read_hyperparameters(self._model)
        heads = sizes.head_count if part == "attn_q" else sizes.head_count_kv
        if stored.shape[0] % (2 * heads):
            what = f"expected a multiple of {2 * heads} rows for {heads} heads of the model, found {stored.shape[0]}"
            raise fail_at(self._weights, f"tensor {shown(stored.name)}", what, "give an adapter of this model")
        return heads
