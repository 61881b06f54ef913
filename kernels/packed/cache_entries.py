"""Files of the packed-weight cache, opened defensively: no blocking, no links."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_MOST_BYTES = 1 << 18
"""Of an entry: names are short, the path of a model file at most 4096 bytes."""

_NOT_A_FILE = (errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR)
"""Errors of open for links, sockets, devices without a driver, directories."""


class NotAFileError(OSError):
    """A link, a pipe, a directory or the like instead of a file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached layer; its key covers everything its image depends on."""

    key: str  # also the name of its file: a moved or copied entry is invalid
    model: str
    layer: str
    image: str  # SHA-256 of its bytes, in hex
    n_bytes: int
    checksum: int

    def as_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()


_FIELDS: dict[str, type] = {"key": str, "model": str, "layer": str, "image": str, "n_bytes": int, "checksum": int}


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Its descriptor. FileNotFoundError, NotAFileError, or another OSError with its name."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NOT_A_FILE:
            raise
        raise _not_a_file(path) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise _not_a_file(path)


def read_entry(path: Path) -> Entry | None:
    """None if it is missing or damaged. OSError as of `open_regular`."""
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    try:
        fields: Any = json.loads(data) if len(data) <= _MOST_BYTES else None
        is_sound = set(fields) == _FIELDS.keys() and all(type(fields[name]) is _FIELDS[name] for name in fields)
    except (ValueError, TypeError, RecursionError):
        return None
    if not is_sound or fields["key"] != path.stem or not re.fullmatch("[0-9a-f]{64}", fields["image"]):
        return None
    return Entry(**fields)


def _not_a_file(path: Path) -> NotAFileError:
    return NotAFileError(errno.EINVAL, "is no regular file, and in the way", str(path))
