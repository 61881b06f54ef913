"""Sampling that a model's publisher recommends in its file: GGUF's keys `general.sampling.*`."""

from __future__ import annotations

import logging
from types import UnionType
from typing import Any, Final, TypeGuard

import numpy as np

from llamaclust.core.limits import MAX_CONTEXT_TOKENS
from llamaclust.core.sampler_chain import SAMPLERS
from llamaclust.core.sampling_bounds import CHAIN_BOUNDS, MAX_MIROSTAT, MAX_TOP_K, REAL_BOUNDS
from llamaclust.model.gguf.model_file import ModelFile

_PREFIX: Final = "general.sampling."
_REALS: Final = {
    "temp": ("temperature", REAL_BOUNDS["temperature"]),
    "top_p": ("top_p", REAL_BOUNDS["top_p"]),
    "min_p": ("min_p", REAL_BOUNDS["min_p"]),
    "penalty_repeat": ("repeat_penalty", REAL_BOUNDS["repetition_penalty"]),
    "xtc_probability": ("xtc_probability", CHAIN_BOUNDS["xtc_probability"]),
    "xtc_threshold": ("xtc_threshold", CHAIN_BOUNDS["xtc_threshold"]),
    "mirostat_tau": ("mirostat_tau", CHAIN_BOUNDS["mirostat_tau"]),
    "mirostat_eta": ("mirostat_eta", CHAIN_BOUNDS["mirostat_eta"]),
}
_INTEGERS: Final = {
    "top_k": ("top_k", (0, MAX_TOP_K)),
    "penalty_last_n": ("repeat_last_n", (-1, MAX_CONTEXT_TOKENS)),
    "mirostat": ("mirostat", (0, MAX_MIROSTAT)),
}
_log = logging.getLogger(__name__)


def recommended_sampling(file: ModelFile) -> dict[str, Any]:
    """The recommended values, by the names of llama.cpp's request fields. Values that no request could have are logged
    and left out, since they say nothing about the weights."""
    found: dict[str, Any] = {}
    for key, (field, (low, high)) in (_REALS | _INTEGERS).items():
        value = file.metadata.get(_PREFIX + key)
        if _is_of(value, int if key in _INTEGERS else int | float) and low <= value <= high:
            found[field] = value if key in _INTEGERS else _shortest(value)
        elif value is not None:
            _log.warning("%s: %s%s is %.60r and is ignored", file.path, _PREFIX, key, value)
    sequence = file.metadata.get(f"{_PREFIX}sequence")
    if isinstance(sequence, str) and (names := [name for name in sequence.split(";") if name in SAMPLERS]):
        found["samplers"] = list(dict.fromkeys(names))
    return found


def _is_of(value: object, kind: type[int] | UnionType) -> TypeGuard[int | float]:
    return isinstance(value, kind) and not isinstance(value, bool)


def _shortest(value: float) -> float:
    """The shortest decimal number that is the same float32: files have 0.95 as 0.949999988."""
    return float(str(np.float32(value)))
