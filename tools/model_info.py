"""Describes a model file: parameters, bits per weight, bytes per layer and per type."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, prod
from typing import Any

import numpy as np

from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.values import LazyStrings, MetadataValue

_LAYER_NAME = re.compile(r"blk\.(\d{1,6})\.")


@dataclass(frozen=True, slots=True)
class Share:
    """A group of a model's tensors. `name` is a quantization type, a layer's number or a tensor's name."""

    name: str
    tensors: int
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model's weights by type and by layer. Tensors outside the layers (embedding, output) are single entries."""

    total: Share
    by_type: tuple[Share, ...]
    layers: tuple[Share, ...]
    outside: tuple[Share, ...]


def describe(model: ModelFile) -> ModelInfo:
    tensors = list(model.tensors.values())
    layers = _grouped((match[1], tensor) for tensor in tensors if (match := _LAYER_NAME.match(tensor.name)))
    return ModelInfo(
        total=_share("total", tensors),
        by_type=tuple(sorted(_grouped((t.quant_type.name, t) for t in tensors), key=lambda share: -share.bytes)),
        layers=tuple(sorted(layers, key=lambda share: int(share.name))),
        outside=tuple(_share(t.name, [t]) for t in tensors if not _LAYER_NAME.match(t.name)),
    )


def shown_metadata(model: ModelFile, shown_items: int = 8) -> dict[str, Any]:
    """Returns metadata for JSON. An array longer than `shown_items` is replaced by its type and length."""
    return {key: _shown_value(value, shown_items) for key, value in model.metadata.items()}


def as_json(model: ModelFile, info: ModelInfo) -> Mapping[str, Any]:
    return {
        "path": str(model.path),
        "parts": [str(part) for part in model.parts],
        "size_bytes": model.size_bytes,
        "identity": model.identity,
        "parameters": info.total.parameters,
        "bits_per_weight": round(info.total.bits_per_weight, 4),
        "tensors": info.total.tensors,
        "types": [_share_json(share) for share in info.by_type],
        "layers": [_share_json(share) for share in info.layers],
        "outside_layers": [_share_json(share) for share in info.outside],
        "metadata": shown_metadata(model),
    }


def _share_json(share: Share) -> dict[str, Any]:
    return {**asdict(share), "bits_per_weight": round(share.bits_per_weight, 4)}


def _grouped(named: Iterable[tuple[str, Tensor]]) -> list[Share]:
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in named:
        groups[name].append(tensor)
    return [_share(name, tensors) for name, tensors in groups.items()]


def _share(name: str, tensors: list[Tensor]) -> Share:
    parameters = sum(prod(tensor.shape) for tensor in tensors)
    return Share(name, len(tensors), parameters, sum(tensor.n_bytes for tensor in tensors))


def _shown_value(value: MetadataValue, shown_items: int) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return str(value)  # JSON has no infinity and no NaN.
    if isinstance(value, bool | int | float | str):
        return value
    if len(value) <= shown_items:
        each = value.tolist() if isinstance(value, np.ndarray) else value
        return [_shown_value(one, shown_items) for one in each]
    kind = value.dtype.name if isinstance(value, np.ndarray) else "text" if isinstance(value, LazyStrings) else "array"
    return {"array_of": kind, "length": len(value)}
