"""Bounds on fields from a peer: each check returns its value or raises a ProtocolError that names field and bound.

Dataclasses carry them in `Annotated`; wire/codec.py applies them to every field of a message that it decodes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from llamaclust.core.errors import ProtocolError

MAX_TEXT = 4096
MAX_GPUS = 16
MAX_LAYERS = 1 << 16
UINT64 = (1 << 64) - 1

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")  # a cluster file has the same rule


def bounded(what: str, value: int, low: int, high: int) -> int:
    """`value` within [low, high]."""
    if not low <= value <= high:
        raise ProtocolError(f"{what} is {value}, must be within {low}..{high}")
    return value


def finite(what: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """A number that is neither NaN nor infinite, within [low, high]."""
    if not (math.isfinite(value) and low <= value <= high):
        raise ProtocolError(f"{what} is {value}, must be a finite number within {low}..{high}")
    return value


def line(what: str, value: str, most: int = MAX_TEXT) -> str:
    """Printable text: white space folded, control characters dropped, so that it is safe in any terminal."""
    if value.isalnum() and len(value) <= most:
        return value
    bounded(f"length of {what}", len(value), 0, most)
    return "".join(c for c in " ".join(value.split()) if c.isprintable())


def path(what: str, value: str) -> str:
    """A possible file name."""
    if "\0" in value or not value:
        raise ProtocolError(f"{what} is empty or holds a zero byte")
    return value


def one_line(text: str, most: int = 1000) -> str:
    """Local text in the form that `line` accepts on the other side."""
    folded = " ".join(text.split())
    return folded if len(folded) <= most else folded[: most - 3] + "..."


def worker_name(value: str) -> str:
    """A name that is safe as a file name."""
    if not _NAME.fullmatch(value):
        raise ProtocolError(
            f"worker name {value[:80]!r} must be 1 to 63 letters, digits, '_', '.' or '-', no sign at either end"
        )
    return value


class Bound(Protocol):
    """The check of one field."""

    def check(self, what: str, value: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Integer:
    """Within [low, high]."""

    low: int
    high: int

    def check(self, what: str, value: int) -> int:
        return bounded(what, value, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Real:
    """A finite number within [low, high]."""

    low: float
    high: float

    def check(self, what: str, value: float) -> float:
        return finite(what, value, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of printable text of at most `most` characters."""

    most: int

    def check(self, what: str, value: str) -> str:
        return line(what, value, self.most)


@dataclass(frozen=True, slots=True)
class Sentence:
    """Text for people: the sender shortens it to one line."""

    def fit(self, value: str) -> str:
        return one_line(value)

    def check(self, what: str, value: str) -> str:
        return line(what, value)


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a log, indented as it was, without characters that move a terminal's cursor."""

    most: int

    def fit(self, value: str) -> str:
        text = value.encode("utf-8", "backslashreplace").decode()  # protobuf refuses lone surrogates
        return text if len(text) <= self.most else text[: self.most - 3] + "..."

    def check(self, what: str, value: str) -> str:
        bounded(f"length of {what}", len(value), 0, self.most)
        return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in value)


@dataclass(frozen=True, slots=True)
class FilePath:
    """Not empty, without zero bytes."""

    def check(self, what: str, value: str) -> str:
        return path(what, value)


@dataclass(frozen=True, slots=True)
class Name:
    """A worker's name."""

    def check(self, what: str, value: str) -> str:
        return worker_name(value)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of `values`."""

    values: tuple[str, ...]

    def check(self, what: str, value: str) -> str:
        if value not in self.values:
            raise ProtocolError(f"{what} {line(what, value, 64)!r} is not one of {', '.join(self.values)}")
        return value


@dataclass(frozen=True, slots=True)
class Size:
    """Number of items or bytes, within [low, high]."""

    low: int
    high: int

    def check(self, what: str, value: Any) -> Any:
        bounded(f"size of {what}", len(value), self.low, self.high)
        return value


@dataclass(frozen=True, slots=True)
class Sha256:
    """64 hexadecimal digits."""

    def check(self, what: str, value: str) -> str:
        if not re.fullmatch("[0-9a-f]{64}", value):
            raise ProtocolError(f"{what} is not a SHA-256 in hexadecimal digits")
        return value


Address = Annotated[str, Line(512)]
"""gRPC target."""
DeviceName = Annotated[str, Line(64)]
Digest = Annotated[str, Sha256()]
MemoryBytes = Annotated[int, Integer(0, 1 << 50)]
"""Few enough that sums are exact in any type."""
ModelId = Annotated[str, Line(128)]
ModelPath = Annotated[str, FilePath()]
Rate = Annotated[float, Real(1.0, 1e18)]
Reason = Annotated[str, Sentence()]
WorkerName = Annotated[str, Name()]
