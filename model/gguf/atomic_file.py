"""Writes files that appear under their names only when all of them are complete."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from llamaclust.core.errors import UsageError
from llamaclust.core.regular_file import sync_folder, take_lock
from llamaclust.core.sizes import MIB

_RESERVE_BYTES: Final = 1 << 24
_PART: Final = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf", re.DOTALL)

Opened = Callable[[Path], AbstractContextManager[BinaryIO]]


@contextmanager
def new_file(path: Path, size_bytes: int, advice: str = "") -> Iterator[BinaryIO]:
    with new_files([path], size_bytes, advice) as opened, opened(path) as file:
        yield file


@contextmanager
def new_files(paths: Sequence[Path], size_bytes: int, advice: str = "") -> Iterator[Opened]:
    """Yields a function that opens the files, which must be in the same folder. If the block ends without an error, the
    files get their final names. Otherwise, they are deleted. Raises UsageError if the disk has too little space (with
    `advice` appended) or if another process writes the files."""
    first = paths[0]
    for path in paths:
        _check_place(path)
    try:
        with _locked(first):
            try:
                _clear(paths)
                _check_room(first, size_bytes, advice)
                yield _opened
                for path in reversed(paths):
                    hidden_name(path).replace(path)
            except BaseException:
                for path in reversed(paths):
                    hidden_name(path).unlink(missing_ok=True)
                raise
            sync_folder(first.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"{first}: the disk is full; {size_bytes // MIB} MiB are needed") from None
        raise


def part_paths(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", out.stem)
    return [out.with_name(f"{stem}-{number + 1:05}-of-{count:05}.gguf") for number in range(count)]


def hidden_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder does not exist; create it first")
    if path.is_dir():
        raise UsageError(f"{path}: this is a folder; give the name of a file")
    if path.exists() and not path.is_file():  # Devices such as /dev/null must not be replaced.
        raise UsageError(f"{path}: this is not a regular file; give another name")


def _check_room(path: Path, size_bytes: int, advice: str) -> None:
    free = shutil.disk_usage(path.parent).free
    if size_bytes + _RESERVE_BYTES > free:
        needed = -(-(size_bytes + _RESERVE_BYTES) // MIB)
        raise UsageError(f"{path}: the file needs {needed} MiB on the disk, but {free // MIB} MiB are free{advice}")


def _no_links(path: str, flags: int) -> int:
    """Opens a file. Raises OSError if it is a symbolic link, because another user may have created the link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with open(hidden_name(path), "wb", opener=_no_links) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    part = hidden_name(path)
    try:
        while True:
            with open(part, "ab", opener=_no_links) as file:
                if not take_lock(file):
                    raise UsageError(f"{path}: another process is writing it; wait for it or give another name")
                if _is_at(file, part):  # False if the process that held the lock has renamed the file.
                    file.truncate(0)
                    yield
                    return
    except BaseException:  # An interrupt may come just after the file was created.
        with suppress(OSError):
            _delete_unlocked([part])
        raise


def _is_at(file: BinaryIO, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _clear(paths: Sequence[Path]) -> None:
    """Deletes partial files of this model that interrupted processes left behind."""
    for path in paths[1:]:
        hidden_name(path).unlink(missing_ok=True)
    mine = _PART.fullmatch(paths[0].name)
    if mine is None:
        return
    others: dict[str, list[Path]] = {}
    for part in sorted(paths[0].parent.glob(".*.part")):
        found = _PART.fullmatch(part.name.removeprefix(".").removesuffix(".part"))
        if found and found["stem"] == mine["stem"] and found["count"] != mine["count"]:
            others.setdefault(found["count"], []).append(part)
    for parts in others.values():
        _delete_unlocked(parts)


def _delete_unlocked(parts: Sequence[Path]) -> None:
    with open(parts[0], "r+b", opener=_no_links) as file:
        if take_lock(file):
            for part in reversed(parts):
                part.unlink(missing_ok=True)
