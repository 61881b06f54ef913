"""Single files, read and written with care: a pipe would block for ever, text has several encodings, and a reader sees
no part of what is written."""

from __future__ import annotations

import codecs
import errno
import fcntl
import json
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

_JSON_BYTES = 16 << 20
"""Of a file of JSON; measured profiles take a few KiB a machine."""
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def decode_text(data: bytes) -> str:
    """The text in a user's file: UTF-8, or UTF-16 with a byte-order mark, which is no part of it. ValueError with the
    place of what is no text."""
    mark, encoding = next(((mark, encoding) for mark, encoding in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object.count("\n".encode(encoding), 0, error.start) + 1
        place = f"byte {len(mark) + error.start}, line {line}"
        raise ValueError(f"not {encoding.upper()} text at {place}; save it as UTF-8") from None
    if (zero := text.find("\0")) >= 0:
        place = f"byte {len(mark) + len(text[:zero].encode(encoding))}, line {text.count(chr(10), 0, zero) + 1}"
        raise ValueError(f"not text: a zero byte at {place}; save it as UTF-8")
    return text


def read_given(path: Path, most_bytes: int) -> bytes:
    """The first bytes of a file, or of a pipe such as a shell's `<(...)`, that a user names. OSError, also for a pipe
    that no process writes to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        first = b""
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            with suppress(BlockingIOError):  # a process has it open, and writes later
                if not (first := os.read(descriptor, most_bytes)):
                    raise OSError(errno.EPIPE, "a pipe that no process writes to")
        os.set_blocking(descriptor, True)
        return first + file.read(most_bytes - len(first))


class NotRegularError(OSError):
    """A directory, a pipe, a device or the like instead of a file."""


def open_descriptor(path: Path, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file, without waiting for a writer of a pipe; a file that is made has mode 0600.
    NotRegularError, or the OSError of the system."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise NotRegularError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise NotRegularError(errno.EINVAL, "not a regular file")


def open_regular(path: Path, *, follows_links: bool = True, is_writable: bool = False) -> BinaryIO:
    """Opens a file for reading, and for writing if `is_writable`. OSError, also if it is no regular file, or a link
    that is not followed."""
    flags = (os.O_RDWR if is_writable else os.O_RDONLY) | (0 if follows_links else os.O_NOFOLLOW)
    file: BinaryIO = os.fdopen(open_descriptor(path, flags), "r+b" if is_writable else "rb")
    return file


def read_bytes(path: Path, most_bytes: int, *, follows_links: bool = True) -> bytes:
    """OSError where the file cannot be read, ValueError where it is larger than so many bytes."""
    with open_regular(path, follows_links=follows_links) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"larger than {most_bytes >> 20} MiB")
    return data


def file_version(path: Path) -> tuple[int, ...]:
    """Returns numbers that change when the file does; none if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


def read_text(path: Path, most_bytes: int) -> str:
    """As `read_bytes`. ValueError also for what is no text."""
    return decode_text(read_bytes(path, most_bytes))


def read_json(path: Path) -> Any:
    """OSError where the file cannot be read, ValueError where it holds no JSON."""
    try:
        return json.loads(read_text(path, _JSON_BYTES))
    except RecursionError:
        raise ValueError("nested too deeply") from None


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


def write_text(path: Path, text: str, *, is_synced: bool = True) -> None:
    """As `write_bytes`."""
    write_bytes(path, text.encode(), is_synced=is_synced)


def sync_folder(folder: Path) -> None:
    """The names in it are on the disk afterwards."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(file: BinaryIO | int, kind: int = fcntl.LOCK_EX) -> bool:
    """Locks a file at once. False where another process, or another descriptor of this one, has it locked."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
