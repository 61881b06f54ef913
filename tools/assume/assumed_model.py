"""Models without weights. Their tensors have the exact sizes of a known model or a file. A quantization mix, such as
Q4_K_M, gives each tensor the type that `model quantize` would choose."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Final

import numpy as np

from llamaclust.cluster.config.catalog import (
    CatalogEntry,
    find_entry,
    locate,
    near_names,
    nearest_names,
    resolve_model,
)
from llamaclust.cluster.config.model_sources import shortened
from llamaclust.cluster.config.public_models import public_models
from llamaclust.cluster.launchers.models.projectors import choose_projector
from llamaclust.core.errors import UsageError
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.tensors import FileIdentity, Tensor
from llamaclust.model.gguf.values import MetadataValue
from llamaclust.model.loader import Model
from llamaclust.model.projectors.projector import Projector
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.assume.public_shapes import IN_CATALOG, public_shapes
from llamaclust.tools.assume.shapes import SHAPES, ModelShape
from llamaclust.tools.quantize.mixes import ALIASES, MIXES, Mix
from llamaclust.tools.quantize.type_choice import MixChoice, choose_types, is_kept

_NO_FILE: Final = FileIdentity(0, 0, 0, 0)
_ALL: Final = "`llamaclust plan --assume MACHINES` lists all shapes, `llamaclust model list` the catalog"

_MIXES: Final = {
    **ALIASES,
    "MXFP4": "MXFP4_MOE",
    "Q2": "Q2_K",
    "Q3": "Q3_K_M",
    "Q4": "Q4_K_M",
    "Q5": "Q5_K_M",
    "Q6": "Q6_K",
    "Q8": "Q8_0",
}


@dataclass(frozen=True)  # No slots, because cached_property stores the opened model in the instance.
class AssumedModel:
    """A model to plan on described machines. `mix` is a key of MIXES, or None if tensors keep the types in the file."""

    title: str
    file: ModelFile
    mix: str | None
    catalog_name: str = ""  # Name without a quantization. Empty if the catalog lacks the model.
    has_file: bool = False  # True if the model has a file. The file's folder may hold a projector.

    @cached_property
    def opened(self) -> Model:
        return Model(self.file)

    @cached_property
    def _with_own_projector(self) -> Model:
        return self._with(choose_projector(self.opened, None)[0]) if self.has_file else self.opened

    def with_projector(self, mmproj: str | None) -> Model:
        """Returns the model with the projector that `mmproj` selects. Raises the errors of `choose_projector`."""
        return self._with_own_projector if mmproj is None else self._with(choose_projector(self.opened, mmproj)[0])

    def _with(self, projector: Projector | None) -> Model:
        if projector is None:
            return self.opened
        model = copy(self.opened)
        model.projector = projector
        return model

    @property
    def lacks_encoder(self) -> bool:
        """True if the model reads images, but its image encoder is unknown until the model is downloaded."""
        model = public_models().get(self.catalog_name)
        return not self.has_file and model is not None and bool(model.mmproj)

    def quantized(self, mix: str) -> AssumedModel:
        """Returns the model in another quantization mix. Raises UsageError if the architecture is not supported."""
        return replace(self, file=_quantized(self.file, MIXES[mix]), mix=mix)

    @property
    def shown_mix(self) -> str | None:
        return "MXFP4" if self.mix == "MXFP4_MOE" else self.mix

    @property
    def is_in_catalog(self) -> bool:
        model = public_models().get(self.catalog_name)
        return model is not None and self.mix in map(_mix, model.quantizations)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.file.size_bytes / sum(prod(tensor.shape) for tensor in self.file.tensors.values())

    @property
    def has_mxfp4(self) -> bool:
        return any(tensor.quant_type is QuantType.MXFP4 for tensor in self.file.tensors.values())


def assumed_model(spec: str) -> AssumedModel:
    """Finds a model by SHAPE[:MIX], catalog name or path. Raises UsageError with similar names if it is unknown."""
    name, mix = _split(spec)
    if (shape := SHAPES.get(name.lower())) is not None:
        return shape_model(name.lower(), shape, mix)
    entry = _catalog_entry(spec)
    if entry is not None and not _is_downloaded(entry):
        return _catalog_model(entry, spec, mix)
    if mix is None or _quantization_of(spec) is not None:  # The catalog has a file in this quantization.
        name, mix = spec, None
    try:
        path = resolve_model(name)
    except UsageError as error:
        raise _unknown_error(name, error) from error
    in_catalog = "" if entry is None else entry.name.partition(":")[0]
    found = AssumedModel(path.stem, open_model(path), None, in_catalog, has_file=True)
    return found if mix is None else found.quantized(mix)


def shape_model(name: str, shape: ModelShape, mix: str | None = None) -> AssumedModel:
    return AssumedModel(shape.title, _file_of(name, shape), None, IN_CATALOG.get(name, name)).quantized(
        mix or shape.mix
    )


def with_file_size(entry: CatalogEntry) -> CatalogEntry:
    """Returns the entry. A missing file size is computed from the model's shape."""
    plain, _, quantization = entry.name.partition(":")
    shape, mix = public_shapes().get(plain), _mix(quantization)
    if shape is None or mix is None or entry.size_bytes is not None:
        return entry
    return replace(entry, about_bytes=shape_model(plain, shape, mix).file.size_bytes)


def _catalog_entry(spec: str) -> CatalogEntry | None:
    """Returns the catalog's entry for NAME or NAME:MIX. If the catalog lacks this mix, returns the entry for NAME."""
    name, colon, _ = spec.rpartition(":")
    entry = _quantization_of(spec)
    return find_entry(name) if entry is None and colon and _split(spec)[1] is not None else entry


def _quantization_of(spec: str) -> CatalogEntry | None:
    try:
        return find_entry(spec)
    except UsageError:
        if _split(spec)[1] is None:
            raise
        return None  # The catalog has this model, but only in other quantizations.


def _is_downloaded(entry: CatalogEntry) -> bool:
    found = locate(entry.name)
    return isinstance(found, Path) or found.is_there


def _catalog_model(entry: CatalogEntry, spec: str, mix: str | None) -> AssumedModel:
    plain, _, quantization = entry.name.partition(":")
    shape = public_shapes().get(plain)
    if shape is None:
        near = near_names(plain, _known_names())
        like = f"; similar names with a known shape: {', '.join(near)}" if near else ""
        raise UsageError(
            f"--model: {spec}: the file's size is {entry.shown_size}, but the model's shape is unknown{like}; {_ALL}"
        )
    return shape_model(plain, shape, mix or _mix(quantization))


def _unknown_error(name: str, error: UsageError) -> UsageError:
    if "/" in name or ":" in name or name.endswith(".gguf"):
        return UsageError(f"--model: {error}")
    near = nearest_names(name, _known_names())
    return UsageError(f"--model: {shortened(name)}: neither a file nor a model of a known shape{near}; {_ALL}")


def _known_names() -> list[str]:
    return list(dict.fromkeys((*SHAPES, *public_shapes())))


def _mix(text: str) -> str | None:
    """Returns the key in MIXES for any spelling of a mix, such as `q4`. Returns None for other texts."""
    name = _MIXES.get(text.upper(), text.upper())
    return name if name in MIXES else None


def _split(spec: str) -> tuple[str, str | None]:
    name, colon, last = spec.rpartition(":")
    if colon and (mix := _mix(last)) is not None:
        return name, mix
    if colon and (name.lower() in SHAPES or name.lower() in public_models()):
        raise UsageError(f"--model: {last!r} is not a quantization; known: {', '.join(MIXES).lower()}")
    return spec, None


def _file_of(name: str, shape: ModelShape) -> ModelFile:
    """Returns a model file without data. Matrices are F16, except experts that were published as MXFP4."""
    path = Path(name)
    tensors = {name: _tensor(path, name, _source_type(shape, name, sizes), sizes) for name, sizes in shape.tensors()}
    return ModelFile(
        path=path,
        parts=(path,),
        size_bytes=sum(tensor.n_bytes for tensor in tensors.values()),
        identity=sha256(name.encode()).hexdigest(),
        metadata=_metadata(shape),
        tensors=tensors,
    )


def _source_type(shape: ModelShape, name: str, sizes: tuple[int, ...]) -> QuantType:
    if is_kept(name, sizes):
        return QuantType.F32
    return QuantType.MXFP4 if shape.mix == "MXFP4_MOE" and len(sizes) == 3 else QuantType.F16


def _metadata(shape: ModelShape) -> Mapping[str, MetadataValue]:
    own: dict[str, MetadataValue] = {
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "block_count": shape.layers + shape.has_nextn,
        "feed_forward_length": shape.ffn,
        "vocab_size": shape.vocabulary,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": shape.rope_base,
        "rope.dimension_count": shape.head_dim,
    }
    if shape.has_nextn:
        own["nextn_predict_layers"] = 1
    if shape.experts:
        own |= {
            "expert_count": shape.experts,
            "expert_used_count": shape.used,
            "expert_feed_forward_length": shape.expert_ffn,
        }
    own |= {**shape.keys, **{key: np.array(values, np.int32) for key, values in shape.arrays.items()}}
    named = {f"{shape.architecture}.{key}": value for key, value in own.items()}
    return {"general.architecture": shape.architecture, **named}


def _quantized(file: ModelFile, mix: Mix) -> ModelFile:
    """Changes tensor types as `quantize` would. An MXFP4 tensor that would become larger keeps its type."""
    types = choose_types(file, MixChoice(mix))
    tensors = {name: _retyped(tensor, types[name]) for name, tensor in file.tensors.items()}
    return replace(file, tensors=tensors, size_bytes=sum(tensor.n_bytes for tensor in tensors.values()))


def _retyped(tensor: Tensor, quant_type: QuantType) -> Tensor:
    changed = _tensor(tensor.path, tensor.name, quant_type, tensor.shape)
    is_kept_smaller = tensor.quant_type is QuantType.MXFP4 and changed.n_bytes > tensor.n_bytes
    return tensor if quant_type is tensor.quant_type or is_kept_smaller else changed


def _tensor(path: Path, name: str, quant_type: QuantType, shape: tuple[int, ...]) -> Tensor:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    n_bytes = rows * quant_type.info.row_bytes(shape[-1])
    return Tensor(name, quant_type, shape, path, 0, n_bytes, _NO_FILE)
