"""What lies in the folder of prepared layers, opened with suspicion: nothing is waited for, and no link is followed."""

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
"""What the system says of links, sockets, devices without a driver, directories."""


class NotAFileError(OSError):
    """A link, a pipe, a directory or the like in the place of a file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A layer that is prepared; found by a key made of all that its image depends on."""

    key: str  # also the name of its file: an entry that was moved or copied to another one's place is none
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
    """None where there is none, or a damaged one, whatever the damage. Else OSError as of `open_regular`."""
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    try:
        said: Any = json.loads(data) if len(data) <= _MOST_BYTES else None
        is_sound = set(said) == _FIELDS.keys() and all(type(said[name]) is _FIELDS[name] for name in said)
    except (ValueError, TypeError, RecursionError):
        return None
    if not is_sound or said["key"] != path.stem or not re.fullmatch("[0-9a-f]{64}", said["image"]):
        return None
    return Entry(**said)


def _not_a_file(path: Path) -> NotAFileError:
    return NotAFileError(errno.EINVAL, "is no regular file, and in the way", str(path))
