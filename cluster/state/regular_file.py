"""Files of the state directory as they are read: neither links to pipes, nor without end, nor nested without end."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

_MOST_BYTES = 16 << 20
"""Of a file that is read as a whole; measured profiles take a few KiB a machine."""


def open_regular(path: Path) -> BinaryIO:
    """To be read. OSError, also where it is no regular file."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def read_json(path: Path) -> Any:
    """OSError where the file cannot be read, ValueError where it holds no JSON."""
    with open_regular(path) as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"larger than {_MOST_BYTES >> 20} MiB")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
