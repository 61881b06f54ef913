"""Reads and writes single files safely. Opening a file never blocks on a pipe, and a write is atomic."""

from __future__ import annotations

import codecs
import errno
import fcntl
import json
import os
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

_LOCK_RETRY_S = 0.02
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def decode_text(data: bytes) -> str:
    """Decodes UTF-8, or UTF-16 with a byte-order mark, and drops the mark. Raises ValueError with the fault's place."""
    mark, encoding = next(((mark, encoding) for mark, encoding in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object.count("\n".encode(encoding), 0, error.start) + 1
        place = f"byte {len(mark) + error.start} in line {line}"
        raise ValueError(f"{place} is not {encoding.upper()} text; save the file as UTF-8") from None
    if (zero := text.find("\0")) >= 0:
        place = f"byte {len(mark) + len(text[:zero].encode(encoding))} in line {text.count(chr(10), 0, zero) + 1}"
        raise ValueError(f"this is not text, because {place} is zero; save the file as UTF-8")
    return text


def read_given(path: Path, most_bytes: int) -> bytes:
    """Reads up to `most_bytes` from a file or from a pipe such as `<(...)`. Raises OSError if a pipe has no writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        first = b""
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            with suppress(BlockingIOError):  # A process has opened the pipe and will write later.
                if not (first := os.read(descriptor, most_bytes)):
                    raise OSError(errno.EPIPE, "no process writes to this pipe")
        os.set_blocking(descriptor, True)
        return first + file.read(most_bytes - len(first))


class NotRegularError(OSError):
    """The path is not a regular file, but for example a directory, a pipe or a device."""


def open_descriptor(path: Path, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file, or creates it with mode 0600. Raises OSError. Never waits for a writer of a pipe."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise NotRegularError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise NotRegularError(errno.EINVAL, "not a regular file")


def open_regular(path: Path, *, follows_links: bool = True, is_writable: bool = False) -> BinaryIO:
    """Opens a regular file. Raises OSError for any other file, and for a link if `follows_links` is false."""
    flags = (os.O_RDWR if is_writable else os.O_RDONLY) | (0 if follows_links else os.O_NOFOLLOW)
    file: BinaryIO = os.fdopen(open_descriptor(path, flags), "r+b" if is_writable else "rb")
    return file


def read_bytes(path: Path, most_bytes: int, *, follows_links: bool = True) -> bytes:
    with open_regular(path, follows_links=follows_links) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"the file is larger than {most_bytes >> 20} MiB")
    return data


def file_version(path: Path) -> tuple[int, ...]:
    """Returns numbers that differ after any change of the file. Returns () if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


def read_text(path: Path, most_bytes: int) -> str:
    return decode_text(read_bytes(path, most_bytes))


def read_json(path: Path, most_bytes: int = 16 << 20) -> Any:
    try:
        return json.loads(read_text(path, most_bytes))
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def write_bytes(path: Path, data: bytes, *, is_synced: bool = True) -> None:
    """Writes a file of mode 0600 atomically. If `is_synced`, the file survives power failures."""
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


def write_text(path: Path, text: str, *, is_synced: bool = True) -> None:
    write_bytes(path, text.encode(), is_synced=is_synced)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(file: BinaryIO | int, kind: int = fcntl.LOCK_EX) -> bool:
    """Locks a file without waiting. Returns False if another process or another file descriptor holds the lock."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_lock_within(file: BinaryIO | int, seconds: float) -> bool:
    """Locks a file. Waits up to `seconds` for another holder to release it. Returns False if it is still locked."""
    deadline_s = time.monotonic() + seconds
    while not take_lock(file):
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(_LOCK_RETRY_S)
    return True
