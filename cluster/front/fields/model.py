"""The fields `model` and `keep_alive`: names that a request may use, and how long its model stays loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.scheduler.validation import check_adapters
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import AdapterScales


class ModelNames:
    """Which models requests may name."""

    def __init__(self, served: str, settings: ApiSettings, *, any_by_default: bool = False) -> None:
        """`any_by_default`: unless the settings say otherwise, a request may name any model."""
        self._served = served
        self._names = {served, *settings.aliases}
        self._adapters = settings.adapters
        self._takes_any = any_by_default if settings.strict_model is None else not settings.strict_model

    def adapters(
        self, name: str | None, lora: AdapterScales | None = None, default: AdapterScales = ()
    ) -> AdapterScales:
        """What a request for a model is computed with: an adapter that it names as the model, those of its field
        `lora`, or `default`. HttpError 404 for another model's name; ParameterError for both of the former, and for an
        adapter that is none."""
        if (number := self._adapters.number_of(name)) is not None:
            if lora is not None:
                raise ParameterError("lora", f"model names the adapter {name!r} already: leave one of them out")
            scale = self._adapters[number].scale
            return ((number, scale),) if scale else ()
        self.check(name)
        if lora is None:
            return default
        check_adapters(lora, self._adapters.numbers)
        return tuple((adapter, scale) for adapter, scale in lora if scale)

    def shown(self, name: str | None) -> str:
        """The name of the model in replies."""
        return name if name is not None and name in self._adapters.names else self._served

    def check(self, name: str | None) -> None:
        """Another model's name is refused, lest its answers seem to be this model's, and an adapter's where none is
        taken. HttpError."""
        if name in self._adapters.names:
            message = f"model: {name!r} is an adapter; here only {self._served!r} itself is computed with"
            raise HttpError(400, "unsupported_parameter", message, param="model")
        if name is not None and name not in self._names and not self._takes_any:
            served = ", ".join(map(repr, (self._served, *self._adapters.names)))
            message = f"model: {name[:200]!r} is not served here, only {served}"
            raise HttpError(404, "model_not_found", message, param="model")


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
