"""What Ollama's clients see of the served model's file."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from llamaclust.cluster.front.text.service import TextSettings
from llamaclust.model.adapters import own_tensors
from llamaclust.model.gguf.model_file import ModelFile

_UNITS: Final = ((1_000_000_000_000, "T"), (1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K"))
_MOST_ITEMS: Final = 1 << 10
"""Longer arrays, such as vocabularies, are left out."""


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """Fixed for the life of an app."""

    digest: str  # SHA-256 in hex of the model's identity: headers, sizes and samples of the weights
    size_bytes: int
    modified_at: str
    family: str
    parameters: int
    quantization: str  # type of most weights
    info: dict[str, Any]  # metadata of the file

    @classmethod
    def of(cls, settings: TextSettings) -> ModelDetails:
        """Of a model without a file only the name is known."""
        file = settings.file
        if file is None:
            digest = hashlib.sha256(settings.model_name.encode()).hexdigest()
            return cls(digest, 0, _time(0), "", 0, "", {})
        weights = _weights(file)
        parameters = weights.total()
        return cls(
            digest=file.identity,
            size_bytes=file.size_bytes,
            modified_at=_modified(file.path),
            family=file.metadata_str("general.architecture", ""),
            parameters=parameters,
            quantization=weights.most_common(1)[0][0] if parameters else "",
            info={key: _shown(value) for key, value in file.metadata.items()} | {"general.parameter_count": parameters},
        )

    @property
    def shown(self) -> dict[str, Any]:
        """The field `details` of Ollama's replies."""
        return {
            "parent_model": "",
            "format": "gguf",
            "family": self.family,
            "families": [self.family],
            "parameter_size": _count(self.parameters),
            "quantization_level": self.quantization,
        }


def _weights(file: ModelFile) -> Counter[str]:
    """How many weights of each type the model has without its adapters."""
    weights: Counter[str] = Counter()
    for tensor in own_tensors(file):
        weights[tensor.quant_type.name] += math.prod(tensor.shape)
    return weights


def _count(parameters: int) -> str:
    """As 135M or 1.5B."""
    for unit, letter in _UNITS:
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return str(parameters)


def _modified(path: Path) -> str:
    """The file may have been deleted since."""
    try:
        return _time(path.stat().st_mtime)
    except OSError:
        return _time(0)


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _shown(value: Any) -> Any:
    """Long arrays, and numbers that JSON lacks, are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int):
        return value
    if len(value) > _MOST_ITEMS:
        return None
    items = value.tolist() if isinstance(value, np.ndarray) else value
    return [_shown(item) for item in items]
