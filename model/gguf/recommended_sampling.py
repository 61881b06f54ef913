"""Reads the sampling parameters that a publisher recommends in a model file (GGUF's keys `general.sampling.*`)."""

from __future__ import annotations

import logging
from types import UnionType
from typing import Any, Final, TypeGuard

import numpy as np

from llamaclust.core.sampler.params import SAMPLERS
from llamaclust.core.sampler.table import SAMPLING_TABLE
from llamaclust.model.gguf.model_file import ModelFile

_PREFIX: Final = "general.sampling."
_ROWS: Final = {row.gguf: (row.llamacpp_name or name, row) for name, row in SAMPLING_TABLE.items() if row.gguf}
_log = logging.getLogger(__name__)


def recommended_sampling(file: ModelFile) -> dict[str, Any]:
    """Returns the recommended values under the names of llama.cpp's request fields. Logs and omits invalid values."""
    found: dict[str, Any] = {}
    for key, (field, row) in _ROWS.items():
        value = file.metadata.get(_PREFIX + key)
        if _is_of(value, int if row.is_whole else int | float) and row.low <= value <= row.high:
            found[field] = value if row.is_whole else _shortest(value)
        elif value is not None:
            _log.warning("%s: %s%s is %.60r and is ignored", file.path, _PREFIX, key, value)
    sequence = file.metadata.get(f"{_PREFIX}sequence")
    if isinstance(sequence, str) and (names := [name for name in sequence.split(";") if name in SAMPLERS]):
        found["samplers"] = list(dict.fromkeys(names))
    return found


def _is_of(value: object, kind: type[int] | UnionType) -> TypeGuard[int | float]:
    return isinstance(value, kind) and not isinstance(value, bool)


def _shortest(value: float) -> float:
    """Returns the shortest decimal that rounds to the same float32, because files store 0.95 as 0.949999988."""
    return float(str(np.float32(value)))
