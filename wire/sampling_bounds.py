"""What sampling parameters may be: the API, the scheduler and the wire refuse the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

MAX_TOP_K = (1 << 31) - 1
MAX_PENALTY = 1000.0
MAX_BIAS = 1e9
"""Added to a logit: a token that is never chosen, or always."""

REAL_BOUNDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "temperature": (0.0, 100.0),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (1 / MAX_PENALTY, MAX_PENALTY),
        "frequency_penalty": (-MAX_PENALTY, MAX_PENALTY),
        "presence_penalty": (-MAX_PENALTY, MAX_PENALTY),
    }
)
"""Least and greatest value of each decimal number among SamplingParams."""
