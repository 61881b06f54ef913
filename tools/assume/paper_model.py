"""Models without bytes: of a named shape or of a file's tensors, quantized on paper by the mixes of `quantize`.

They are read and built into programs as any file is, so that weights, KV memory and workspace are what they would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np

from llamaclust.cluster.config.catalog import find_entry, resolve_model
from llamaclust.core.errors import UsageError
from llamaclust.model.gguf.model_file import ModelFile, open_model
from llamaclust.model.gguf.tensors import FileIdentity, Tensor
from llamaclust.model.gguf.values import MetadataValue
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.assume.shapes import SHAPES, Shape
from llamaclust.tools.quantize.mixes import ALIASES, MIXES, Mix
from llamaclust.tools.quantize.type_choice import Wishes, choose_types, is_kept

_NO_FILE: Final = FileIdentity(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class PaperModel:
    """A model of a set of machines. `mix`: None where the types are those of a file."""

    title: str
    file: ModelFile
    mix: str | None

    def quantized(self, mix: str) -> PaperModel:
        """The same model in another mix. UsageError where `quantize` does not know how."""
        return replace(self, file=_quantized(self.file, MIXES[mix]), mix=mix)


def paper_model(spec: str) -> PaperModel:
    """SHAPE[:MIX], a model of the catalog that is there, or the path of one, also with :MIX. UsageError lists the
    shapes."""
    name, mix = _split(spec)
    if (shape := SHAPES.get(name.lower())) is not None:
        return shape_model(name.lower(), shape, mix)
    if mix is None or _is_in_catalog(spec):  # a name of the catalog has a quantization of its own
        name, mix = spec, None
    try:
        path = resolve_model(name)
    except UsageError as error:
        raise UsageError(f"--model: {error}; or one of the shapes {', '.join(SHAPES)}") from error
    found = PaperModel(path.stem, open_model(path), None)
    return found if mix is None else found.quantized(mix)


def shape_model(name: str, shape: Shape, mix: str | None = None) -> PaperModel:
    """A model of such a shape in a mix of MIXES, or in its usual one."""
    return PaperModel(shape.title, _file_of(name, shape), None).quantized(mix or shape.mix)


def _is_in_catalog(spec: str) -> bool:
    """As a whole, with its quantization."""
    try:
        return find_entry(spec) is not None
    except UsageError:  # a model of the catalog, which has others
        return False


def _split(spec: str) -> tuple[str, str | None]:
    """(model, mix): what stands behind the last colon, where that names a mix."""
    name, colon, last = spec.rpartition(":")
    mix = ALIASES.get(last.upper(), last.upper())
    if colon and mix in MIXES:
        return name, mix
    if name.lower() in SHAPES:
        raise UsageError(f"--model: {last!r} is no quantization; known: {', '.join(MIXES).lower()}")
    return spec, None


def _file_of(name: str, shape: Shape) -> ModelFile:
    """With matrices in F16 and everything else in F32."""
    path = Path(name)
    tensors = {
        name: _tensor(path, name, QuantType.F32 if is_kept(name, sizes) else QuantType.F16, sizes)
        for name, sizes in shape.tensors()
    }
    return ModelFile(
        path=path,
        parts=(path,),
        size_bytes=sum(tensor.n_bytes for tensor in tensors.values()),
        identity=sha256(name.encode()).hexdigest(),
        metadata=_metadata(shape),
        tensors=tensors,
    )


def _metadata(shape: Shape) -> Mapping[str, MetadataValue]:
    own: dict[str, MetadataValue] = {
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "block_count": shape.layers,
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
    types = choose_types(file, Wishes(mix))
    tensors = {
        name: tensor if types[name] is tensor.quant_type else _tensor(file.path, name, types[name], tensor.shape)
        for name, tensor in file.tensors.items()
    }
    return replace(file, tensors=tensors, size_bytes=sum(tensor.n_bytes for tensor in tensors.values()))


def _tensor(path: Path, name: str, quant_type: QuantType, shape: tuple[int, ...]) -> Tensor:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    n_bytes = rows * quant_type.info.row_bytes(shape[-1])
    return Tensor(name, quant_type, shape, path, 0, n_bytes, _NO_FILE)
