"""Files of users, read with care: a pipe would block for ever, and text has several encodings."""

from __future__ import annotations

import codecs
import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

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


def open_regular(path: Path, *, follows_links: bool = True, is_writable: bool = False) -> BinaryIO:
    """Opens a file for reading, and for writing if `is_writable`. OSError, also if it is no regular file, or a link
    that is not followed."""
    access = os.O_RDWR if is_writable else os.O_RDONLY
    flags = access | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follows_links else os.O_NOFOLLOW)
    file: BinaryIO = os.fdopen(os.open(path, flags), "r+b" if is_writable else "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file
