"""Checks on fields from a peer: each returns its value or raises a ProtocolError that names the field and the bound."""

from __future__ import annotations

import math
import re
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from llamaclust.core.errors import ProtocolError

MAX_TEXT = 4096
UINT64 = (1 << 64) - 1
_MOST_MEMORY = 1 << 50

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")  # a cluster file has the same rule
_Message = TypeVar("_Message", bound=Message)


def parse(kind: type[_Message], data: bytes, most_bytes: int) -> _Message:
    """A protobuf message from bytes; ProtocolError where they are too many or no such message."""
    if len(data) > most_bytes:
        raise ProtocolError(f"{kind.__name__}: {len(data)} bytes, at most {most_bytes} are taken")
    try:
        message = kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"{kind.__name__}: damaged, cannot be decoded") from error
    message.DiscardUnknownFields()  # of a newer version; nothing of a peer's is kept that is not checked
    return message


def bounded(what: str, value: int, low: int, high: int) -> int:
    """`value` within [low, high]."""
    if not low <= value <= high:
        raise ProtocolError(f"{what} is {value}, must be within {low}..{high}")
    return value


def memory(what: str, n_bytes: int) -> int:
    """Bytes of memory that are there or in use, few enough that sums of them are exact in any type."""
    return bounded(what, n_bytes, 0, _MOST_MEMORY)


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
    """What can name a file."""
    if "\0" in value or not value:
        raise ProtocolError(f"{what} is empty or holds a zero byte")
    return value


def one_line(text: str, most: int = 1000) -> str:
    """Our own text made fit for `line` on the other side."""
    folded = " ".join(text.split())
    return folded if len(folded) <= most else folded[: most - 3] + "..."


def worker_name(value: str) -> str:
    """A name that is safe as a file name."""
    if not _NAME.fullmatch(value):
        raise ProtocolError(
            f"worker name {value[:80]!r} must be 1 to 63 letters, digits, '_', '.' or '-', no sign at either end"
        )
    return value
