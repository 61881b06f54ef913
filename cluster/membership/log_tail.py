"""What a worker's log says last of what went wrong."""

from __future__ import annotations

import os
from pathlib import Path

from llamaclust.core.bounds import line, one_line
from llamaclust.core.logs import read_line

_READ_BYTES = 1 << 16
_HARMLESS = ("DEBUG", "INFO")


def last_error(log: Path, start: int = 0) -> str:
    """The last line that tells of trouble: a warning, an error, or what a traceback or the C library ends with. Empty
    where there is none from byte `start` on."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, os.fstat(file.fileno()).st_size - _READ_BYTES))
            lines = file.read(_READ_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    words = next(filter(None, map(_trouble, reversed(lines))), "")
    return line("last error", one_line(words))


def _trouble(text: str) -> str:
    """What a line tells of trouble. Lines that no logger has written do; indented ones belong to those around them."""
    record = read_line(text)
    if record is not None:
        level, message = record
        return "" if level in _HARMLESS else message
    return "" if text.startswith((" ", "\t")) else text.strip()
