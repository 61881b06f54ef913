"""Single files, read and written with care: neither links to pipes, nor without end, nor half written."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from llamaclust.core.regular_file import decode_text, open_regular
from llamaclust.model.gguf.atomic_file import sync_folder

_MOST_BYTES = 16 << 20
"""Of a file of JSON; measured profiles take a few KiB a machine."""


def read_json(path: Path) -> Any:
    """OSError where the file cannot be read, ValueError where it holds no JSON."""
    try:
        return json.loads(read_text(path, _MOST_BYTES))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_text(path: Path, most_bytes: int) -> str:
    """OSError where the file cannot be read, ValueError where it is larger than so many bytes or no text."""
    return decode_text(read_bytes(path, most_bytes))


def write_regular(path: Path, text: str, *, is_synced: bool = True) -> None:
    """A file of text, as `write_bytes`."""
    write_bytes(path, text.encode(), is_synced=is_synced)


def write_bytes(path: Path, data: bytes, *, is_synced: bool = True) -> None:
    """Writes a file of mode 0600 so that a reader sees the old data or the new, never a part; `is_synced`: also after a
    power failure, and the new data once this returns. Processes of several machines may write it at once: in containers
    all of them have the same id.

    OSError where it cannot be written, as on a full disk; nothing new stays then.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if is_synced:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if is_synced:
            sync_folder(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_bytes(path: Path, most_bytes: int, *, follows_links: bool = True) -> bytes:
    """OSError where the file cannot be read, ValueError where it is larger than so many bytes."""
    with open_regular(path, follows_links=follows_links) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"larger than {most_bytes >> 20} MiB")
    return data
