"""Bounds on the fields of messages from peers. Each check returns the value, or raises a ProtocolError that names the
field and the bound. Dataclasses declare bounds in `Annotated`, and wire/codec.py checks every field that it decodes."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final

from llamaclust.core.errors import ProtocolError

MAX_TEXT = 4096
MAX_ONE_LINE = 1000
MAX_GPUS = 16
MAX_STAGES_HELD = 1024  # by one worker
MAX_LAYERS = 1 << 16
MAX_PERMIT = 4096  # characters
UINT64 = (1 << 64) - 1
LOCAL: Final = {"is_local": True}
"""The metadata of a dataclass field that is not sent. A receiver gives it its default."""
_GREATEST = sys.float_info.max

NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
"""The pattern for the names of workers and clusters. Every such name is also a safe file name."""


def bounded(what: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ProtocolError(f"{what} is {value}, must be within {low}..{high}")
    return value


def finite(what: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    if not max(low, -_GREATEST) <= value <= min(high, _GREATEST):  # an int may be larger; NaN is within no bounds
        raise ProtocolError(f"{what} is {value}, must be a finite number within {low}..{high}")
    return value


def line(what: str, value: str, most: int = MAX_TEXT) -> str:
    """Folds each run of white space into one space and drops control characters, so that terminals show it safely."""
    if value.isalnum() and len(value) <= most:
        return value
    bounded(f"length of {what}", len(value), 0, most)
    return "".join(c for c in " ".join(value.split()) if c.isprintable())


def path(what: str, value: str) -> str:
    if "\0" in value or not value:
        raise ProtocolError(f"{what} is empty or holds a zero byte")
    return value


def one_line(text: str, most: int = MAX_ONE_LINE) -> str:
    """Puts a text from this process on one line and shortens it, so that a receiver's `line` accepts it."""
    folded = " ".join(text.split())
    return folded if len(folded) <= most else folded[: most - 3] + "..."


def worker_name(_: str, value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise ProtocolError(
            f"worker name {value[:80]!r} must be 1 to 63 letters, digits, '_', '.' or '-', no sign at either end"
        )
    return value


def log_line(what: str, value: str, most: int) -> str:
    """Drops control characters, which could move a terminal's cursor, but keeps indentation."""
    bounded(f"length of {what}", len(value), 0, most)
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in value)


def fitted_log_line(text: str, most: int) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()  # protobuf refuses lone surrogates
    return text if len(text) <= most else text[: most - 3] + "..."


def _choice(what: str, value: str, values: tuple[str, ...]) -> str:
    if value not in values:
        raise ProtocolError(f"{what} {line(what, value, 64)!r} is not one of {', '.join(values)}")
    return value


def _size(what: str, value: Any, low: int, high: int) -> Any:
    bounded(f"size of {what}", len(value), low, high)
    return value


def _text(what: str, value: str, low: int, high: int) -> str:
    bounded(f"bytes of {what}", len(value.encode()), low, high)
    return value


def _sha256(what: str, value: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise ProtocolError(f"{what} is not a SHA-256 in hexadecimal digits")
    return value


class Bound:
    """The bound of one field. `check` runs after decoding. `fit` shortens a long text before encoding."""

    def __init__(self, check: Callable[..., Any], *limits: Any, fit: Callable[..., Any] | None = None) -> None:
        self._check = check
        self._limits = limits
        self._fit = fit

    def check(self, what: str, value: Any) -> Any:
        return self._check(what, value, *self._limits)

    def fit(self, value: Any) -> Any:
        return value if self._fit is None else self._fit(value, *self._limits)


Integer = partial(Bound, bounded)
Real = partial(Bound, finite)
Size = partial(Bound, _size)
Text = partial(Bound, _text)
"""Bounds that take the arguments (low, high). `Size` counts items or bytes. `Text` counts bytes of UTF-8."""
Line = partial(Bound, line)
LogLine = partial(Bound, log_line, fit=fitted_log_line)
"""Bounds for texts. The argument is the largest allowed number of characters."""
Choice = partial(Bound, _choice)

Address = Annotated[str, Line(512)]
DeviceName = Annotated[str, Line(64)]
Digest = Annotated[str, Bound(_sha256)]
MemoryBytes = Annotated[int, Integer(0, 1 << 50)]
"""A size in bytes. The bound is so low that floats hold sums of sizes exactly."""
ModelId = Annotated[str, Line(128)]
ModelPath = Annotated[str, Bound(path)]
Rate = Annotated[float, Real(1.0, 1e18)]
Reason = Annotated[str, Bound(line, fit=one_line)]
WorkerName = Annotated[str, Bound(worker_name)]
