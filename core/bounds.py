"""Bounds on the fields of messages from peers. Dataclasses declare them in `Annotated`, and decoding checks them."""

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
MAX_STAGES_HELD = 1024  # Maximum number of stages on one worker.
MAX_LAYERS = 1 << 16
MAX_PERMIT = 4096  # Maximum number of characters of a permit.
UINT64 = (1 << 64) - 1
LOCAL: Final = {"is_local": True}
"""Metadata of a dataclass field that is not sent. The receiver uses the field's default value."""
_GREATEST = sys.float_info.max

NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
"""A regular expression for the names of workers and clusters. Every such name is also a safe file name."""


def bounded(what: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ProtocolError(f"{what} is {value}, must be within {low}..{high}")
    return value


def finite(what: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    # An int may be larger than every float. NaN fails every comparison.
    if not max(low, -_GREATEST) <= value <= min(high, _GREATEST):
        raise ProtocolError(f"{what} is {value}, must be a finite number within {low}..{high}")
    return value


def line(what: str, value: str, most: int = MAX_TEXT) -> str:
    """Replaces white space by single spaces and drops control characters, so that terminals show the text safely."""
    if value.isalnum() and len(value) <= most:
        return value
    bounded(f"length of {what}", len(value), 0, most)
    return "".join(c for c in " ".join(value.split()) if c.isprintable())


def path(what: str, value: str) -> str:
    if "\0" in value or not value:
        raise ProtocolError(f"{what} is empty or contains a zero byte")
    return value


def one_line(text: str, most: int = MAX_ONE_LINE) -> str:
    """Puts a text on one line and cuts it to `most` characters, because receivers refuse longer lines."""
    return fitted_log_line(" ".join(text.split()), most)


def worker_name(_: str, value: str) -> str:
    if not re.fullmatch(NAME, value):
        raise ProtocolError(
            f"worker name {value[:80]!r} must be 1 to 63 letters, digits or '_.-', with a letter or digit at both ends"
        )
    return value


def log_line(what: str, value: str, most: int) -> str:
    """Drops control characters, because they could move a terminal's cursor. Keeps indentation."""
    bounded(f"length of {what}", len(value), 0, most)
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in value)


def fitted_log_line(text: str, most: int) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()  # protobuf refuses lone surrogates.
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
    """The bound of one field. `check` runs after decoding. `fit` runs before encoding and shortens long text."""

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
"""`Size` bounds the number of items or bytes, and `Text` the number of UTF-8 bytes. The arguments are (low, high)."""
Line = partial(Bound, line)
LogLine = partial(Bound, log_line, fit=fitted_log_line)
"""`Line` and `LogLine` bound the number of characters. The argument is the maximum."""
Choice = partial(Bound, _choice)

Address = Annotated[str, Line(512)]
DeviceName = Annotated[str, Line(64)]
Digest = Annotated[str, Bound(_sha256)]
MemoryBytes = Annotated[int, Integer(0, 1 << 50)]
"""A size in bytes. The bound is low enough for floats to hold sums of sizes exactly."""
ModelId = Annotated[str, Line(128)]
ModelPath = Annotated[str, Bound(path)]
Rate = Annotated[float, Real(1.0, 1e18)]
Reason = Annotated[str, Bound(line, fit=one_line)]
WorkerName = Annotated[str, Bound(worker_name)]
