"""Ollama's field `keep_alive`: how long a model stays loaded after a request."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamaclust.cluster.front.errors import HttpError

_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"\d{1,12}(?:\.\d{0,9})?(?:ns|us|µs|ms|s|m|h)"
_DURATION = re.compile(rf"(-?)((?:{_PART})+)")
_MOST_S = 1_000_000_000
"""More is for ever, as Ollama's largest duration is: no calendar has the end of it."""


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """`seconds`: None: until another model needs the memory."""

    seconds: float | None


def read_keep_alive(fields: Mapping[str, Any]) -> KeepAlive | None:
    """Seconds, or a text like "5m"; negative or more than a lifetime: for ever. None where there is none. HttpError 400
    for anything else."""
    value = fields.get("keep_alive")
    if value is None:
        return None
    seconds = _seconds(value)
    if seconds is None or not math.isfinite(seconds):
        message = f'keep_alive: {str(value)[:60]!r} is no duration; give seconds, or a text like "5m"'
        raise HttpError(400, "bad_keep_alive", message, param="keep_alive")
    return KeepAlive(seconds if 0 <= seconds <= _MOST_S else None)


def _seconds(value: object) -> float | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return float(max(-1, min(value, _MOST_S + 1)))  # an int may be larger than any float
    if isinstance(value, float):
        return value
    if not isinstance(value, str) or len(value) > 64:
        return None
    if re.fullmatch(r"-?\d{1,12}", value):
        return float(value)
    if (match := _DURATION.fullmatch(value)) is None:
        return None
    parts = re.findall(r"([\d.]+)(\D+)", match[2])
    return (-1 if match[1] else 1) * sum(float(number) * _UNITS_S[unit] for number, unit in parts)
