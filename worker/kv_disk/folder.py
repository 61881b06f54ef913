"""The folder of KV memory on disk: files of this user alone, at most so many bytes, the longest unused deleted first.

All workers of a machine with the same cache folder share it. Files of one model, KV type and arithmetic lie in a folder
of their own, named by what their content depends on.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from llamaclust.kernels.packed.cache_files import Writing, locked, remove
from llamaclust.worker.kv_disk.kv_file import SUFFIX, KvFile, KvLayers

_UNFINISHED = ".tmp"
_UNFINISHED_S = 600.0
"""An unfinished file as old as this is of a process that was killed."""
_MOST_FILES = 1 << 13
_FREE_SHARE, _FREE_BYTES = 20, 2 << 30
"""Reserved free space of the disk: a twentieth of it, at most 2 GiB."""


class NoRoomError(Exception):
    """Files that may not be written, with the reason."""


@dataclass(frozen=True, slots=True)
class KvFolder:
    """`path` and how many bytes of files it may hold."""

    path: Path
    most_bytes: int

    def create(self, content: str) -> Path:
        """The folder of files whose content depends on `content`. OSError where it cannot be made, or belongs to
        another user, or others may enter: they would read prompts."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.path / content):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise PermissionError(f"{folder} is no folder of this user")
            if stat.S_IMODE(found.st_mode) & 0o077:
                raise PermissionError(f"{folder}: others may enter it (mode {stat.S_IMODE(found.st_mode):o})")
        return self.path / content

    @property
    def used_bytes(self) -> int:
        return sum(found.st_size for _, found in self._files())

    def clear(self) -> tuple[int, int]:
        """Deletes all files; how many, and their bytes. Workers that use them compute what they held. OSError."""
        files = list(self._files())
        for path, _ in files:
            path.unlink(missing_ok=True)
        return len(files), sum(found.st_size for _, found in files)

    def write(self, file: KvFile, kv: KvLayers, blocks: Iterable[int], kept: Container[Path]) -> KvFile:
        """Writes a file under a name of its own, in the folder that its path names, and returns it. To make room, files
        are deleted but those `kept`, the longest unused first. NoRoomError, OSError."""
        name = uuid4().hex
        unfinished = KvFile(file.path / f"{name}{_UNFINISHED}", file.start, file.end, file.layer_bytes, file.keys)
        finished = KvFile(file.path / f"{name}{SUFFIX}", file.start, file.end, file.layer_bytes, file.keys)
        try:
            with locked(self.path / "lock", Writing()):  # others must not fill the same room
                self._make_room(file.size_bytes, kept)
                unfinished.write(kv, list(blocks))
                unfinished.path.rename(finished.path)
        finally:
            remove(unfinished.path)
        return finished

    def _make_room(self, n_bytes: int, kept: Container[Path]) -> None:
        files = sorted(self._files(), key=lambda file: file[1].st_mtime_ns)
        held_bytes = sum(found.st_size for _, found in files)
        disk = os.statvfs(self.path)
        reserved_bytes = min(disk.f_blocks * disk.f_frsize // _FREE_SHARE, _FREE_BYTES)
        room_bytes = disk.f_bavail * disk.f_frsize - reserved_bytes
        for left, (path, found) in zip(range(len(files), 0, -1), files, strict=True):
            if held_bytes + n_bytes <= self.most_bytes and n_bytes <= room_bytes and left < _MOST_FILES:
                return
            if path not in kept:
                remove(path)
                held_bytes, room_bytes = held_bytes - found.st_size, room_bytes + found.st_size
        if held_bytes + n_bytes > self.most_bytes:
            raise NoRoomError(f"{n_bytes} bytes more than {held_bytes} of {self.most_bytes} (kv_disk)")
        if n_bytes > room_bytes:
            raise NoRoomError(f"{n_bytes} bytes would leave less than {reserved_bytes} of the disk free")

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Of all contents, and none but its own: links lead elsewhere, and other names are of other programs. Deletes
        what killed processes left."""
        for path in (file for folder in self.path.glob("*") if not folder.is_symlink() for file in folder.glob("*")):
            with contextlib.suppress(FileNotFoundError):
                found = path.lstat()
                if not stat.S_ISREG(found.st_mode) or path.suffix not in (SUFFIX, _UNFINISHED):
                    continue
                if path.suffix == _UNFINISHED and found.st_mtime < time.time() - _UNFINISHED_S:
                    remove(path)
                else:
                    yield path, found


def mark_used(files: Iterable[KvFile]) -> None:
    """The first ones count as used last: what follows them is of no use without them."""
    now_ns = time.time_ns()
    for before, file in enumerate(files):
        with contextlib.suppress(OSError):
            os.utime(file.path, ns=(now_ns - before, now_ns - before))
