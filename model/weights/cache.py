"""The folder of fetched weights: tensors by the SHA-256 of their bytes, and manifests of models. Knows no network.

A file gets its name only when it is whole, checked and on disk. Processes of one machine share the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Lock

from llamaclust.core.errors import LlamaclustError
from llamaclust.core.regular_file import take_lock
from llamaclust.core.sizes import mib
from llamaclust.model.gguf.tensors import FileIdentity

WHOLE, UNFINISHED, KNOWN, LEASE = ".weights", ".part", ".manifest", ".load"

_WHOLE_NS = 1_000_000_000 * 10**9
"""Time of modification of every whole file: one that was written to afterwards has another."""

_NO_LEASE_NS = 1 << 63
_READ_BYTES = 1 << 22
_LOCK_WAIT_S = 10.0
_LOCK_RETRY_S = 0.02
_HASH = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Cleared:
    files: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class WeightCache:
    """`path` and how many bytes it may hold. It is made on first use, for this user alone."""

    path: Path
    most_bytes: int

    def prepare(self) -> None:
        """Makes the folder. LlamaclustError where that fails, or where others may write there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            found = self.path.stat()
        except OSError as error:
            raise LlamaclustError(f"{self.path}: weights cannot be kept there: {error.strerror}") from error
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
            raise LlamaclustError(f"{self.path}: weights are not kept there, since others may write to it")

    def place(self, content: str) -> Path:
        """Where the bytes with that SHA-256 are, if they are there."""
        assert _HASH.fullmatch(content)
        return self.path / f"{content}{WHOLE}"

    def part_path(self, content: str) -> Path:
        return self.place(content).with_suffix(UNFINISHED)

    def part_bytes(self, content: str) -> int:
        """What is there of an unfinished one; it counts as used now. One that a process writes is left as it is: it may
        be whole at this moment, and then its times say so."""
        try:
            with _opened(self.part_path(content), os.O_NOFOLLOW | os.O_NONBLOCK) as descriptor:
                if take_lock(descriptor):
                    _use(descriptor)
                return os.fstat(descriptor).st_size
        except OSError:
            return 0

    def find(self, content: str) -> FileIdentity | None:
        """None where it is not there; what was changed since it was written is deleted. It counts as used now."""
        path = self.place(content)
        try:
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_mtime_ns != _WHOLE_NS:
                path.unlink()
                return None
            mark_whole(path)
        except OSError:
            return None
        return FileIdentity.from_status(found)

    def known_manifest(self, key: str) -> str | None:
        """SHA-256 of the manifest that was remembered by that name, if it is still there."""
        assert _HASH.fullmatch(key)
        try:
            content = (self.path / f"{key}{KNOWN}").read_text("ascii")
        except (OSError, ValueError):
            return None
        return content if _HASH.fullmatch(content) and self.find(content) is not None else None

    def keep_manifest(self, key: str, data: bytes) -> str:
        """Writes a manifest and remembers it by that name; returns its SHA-256. LlamaclustError where it cannot."""
        content = sha256(data).hexdigest()
        try:
            self._write(self.place(content), data, is_whole=True)
        except OSError as error:
            raise LlamaclustError(f"{self.path}: a manifest cannot be written: {error.strerror}") from error
        self.remember_manifest(key, content)
        return content

    def remember_manifest(self, key: str, content: str) -> None:
        """LlamaclustError where that cannot be written."""
        assert _HASH.fullmatch(key)
        try:
            self._write(self.path / f"{key}{KNOWN}", content.encode(), is_whole=False)
        except OSError as error:
            raise LlamaclustError(f"{self.path}: cannot be written to: {error.strerror}") from error

    def _write(self, path: Path, data: bytes, *, is_whole: bool) -> None:
        made = self.path / f"{secrets.token_hex(8)}.tmp"
        try:
            with made.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if is_whole:
                mark_whole(made)
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """What is found or written meanwhile is not deleted to make room."""
        self.prepare()
        made = self.path / f"{secrets.token_hex(8)}.tmp"
        path = made.with_suffix(LEASE)
        with _opened(made, os.O_CREAT | os.O_EXCL) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                _use(made)
                made.rename(path)  # one without a lock would be deleted: its process is gone
                yield
            finally:
                path.unlink(missing_ok=True)

    def make_room(self, n_bytes: int) -> None:
        """Deletes what was not used for longest and is in no load, until there is room for so many bytes more.
        LlamaclustError where there cannot be."""
        with _locked(self.path):
            since_ns = _oldest_lease_ns(self.path)
            files = sorted(_files(self.path), key=lambda file: _used_ns(file[1]))
            held, free = sum(found.st_size for _, found in files), _free_bytes(self.path)
            for path, found in files:
                if held + n_bytes <= self.most_bytes and n_bytes <= free:
                    break
                with contextlib.suppress(OSError):
                    if _used_ns(found) < since_ns and _delete(path):
                        held, free = held - found.st_size, free + found.st_size
        if held + n_bytes > self.most_bytes:
            what = f"{mib(n_bytes)} MiB more of weights beside {mib(held)} MiB in use"
            raise LlamaclustError(
                f"{self.path}: {what}, {mib(self.most_bytes)} MiB are allowed (LLAMACLUST_WEIGHTS_SIZE)"
            )
        if n_bytes > free:
            what = f"the disk has {mib(free)} MiB free, {mib(n_bytes)} MiB more of weights are needed"
            raise LlamaclustError(f"{self.path}: {what}; make room there, or set LLAMACLUST_HOME to another disk")

    def list_files(self) -> tuple[list[int], list[int]]:
        """Sizes of whole files, and of unfinished ones."""
        found = [(path.suffix, status.st_size) for path, status in _files(self.path)]
        return [size for kind, size in found if kind == WHOLE], [size for kind, size in found if kind == UNFINISHED]

    def clear(self) -> Cleared:
        """Deletes all of it. BlockingIOError where a load is under way; OSError."""
        if not self.path.is_dir():
            return Cleared(0, 0)
        with _locked(self.path):
            if _oldest_lease_ns(self.path) < _NO_LEASE_NS:
                raise BlockingIOError(errno.EAGAIN, "a load is using it; try again later")
            files = list(_files(self.path))
            for path in (*(path for path, _ in files), *self.path.glob(f"*{KNOWN}"), *self.path.glob("*.tmp")):
                path.unlink(missing_ok=True)
        return Cleared(len(files), sum(found.st_size for _, found in files))

    @contextmanager
    def making(self, key: str) -> Iterator[None]:
        """A lock on one key; other processes wait without a limit."""
        with _opened(self.path / f"{key}.lock", os.O_CREAT) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield


class WeightPart:
    """One tensor on its way into the cache: written piece by piece, resumed, and checked before it gets its name.

    Open for writing by one process at a time. Every method blocks; they may be called from any thread.

    `done_bytes` are there; `resumed`: some of them were there before it was opened.
    """

    def __init__(self, cache: WeightCache, content: str, n_bytes: int, descriptor: int) -> None:
        self._cache = cache
        self._content = content
        self._path = cache.part_path(content)
        self._n_bytes = n_bytes
        self._descriptor = descriptor
        self._lock = Lock()
        self._hash = sha256()
        self.done_bytes = 0
        self._take_in()
        self.resumed = self.done_bytes > 0

    @classmethod
    def open(cls, cache: WeightCache, content: str, n_bytes: int) -> WeightPart | None:
        """None where another process writes it, or has finished it. LlamaclustError where it cannot be written."""
        path = cache.part_path(content)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise LlamaclustError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            is_ours = take_lock(descriptor) and os.fstat(descriptor).st_ino == path.stat().st_ino
            if is_ours and cache.find(content) is not None:  # finished just before that file was made
                path.unlink()
                is_ours = False
        except OSError:  # finished, or deleted, after it was opened
            is_ours = False
        if not is_ours:
            os.close(descriptor)
            return None
        return cls(cache, content, n_bytes, descriptor)

    def write(self, pieces: Sequence[bytes | memoryview]) -> None:
        """LlamaclustError where the disk is full, or fails: then nothing of it is kept."""
        with self._lock:
            if self._descriptor < 0:
                return
            for piece in pieces:
                try:
                    self._write(memoryview(piece))
                except OSError as error:
                    raise self._failed(error) from error

    def finish(self) -> bool:
        """Gives a whole one its name. False where it is not what it should be: then it begins anew."""
        with self._lock:
            if self.done_bytes != self._n_bytes or self._hash.hexdigest() != self._content:
                os.ftruncate(self._descriptor, 0)
                self._hash, self.done_bytes, self.resumed = sha256(), 0, False
                return False
            try:
                os.fsync(self._descriptor)
                mark_whole(self._path)
                self._path.rename(self._cache.place(self._content))
            except OSError as error:
                raise self._failed(error) from error
            return True

    def close(self) -> None:
        """What is there stays, for the next one to resume."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _take_in(self) -> None:
        found = os.fstat(self._descriptor).st_size
        if found > self._n_bytes:
            os.ftruncate(self._descriptor, 0)
            return
        while data := os.pread(self._descriptor, _READ_BYTES, self.done_bytes):
            self._hash.update(data)
            self.done_bytes += len(data)

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            count = os.pwrite(self._descriptor, data[done:], self.done_bytes)
            self._hash.update(data[done : done + count])
            done += count
            self.done_bytes += count

    def _failed(self, error: OSError) -> LlamaclustError:
        self._path.unlink(missing_ok=True)
        self._close()
        what = f"{mib(self._n_bytes)} MiB of weights cannot be written: {(error.strerror or str(error)).lower()}"
        return LlamaclustError(f"{self._cache.path}: {what}; make room there, or set LLAMACLUST_HOME to another disk")


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("*"):
        if path.suffix in (WHOLE, UNFINISHED):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.lstat()


def _oldest_lease_ns(folder: Path) -> int:
    """When the oldest load that is under way began."""
    begun = [_NO_LEASE_NS]
    for path in folder.glob(f"*{LEASE}"):
        with contextlib.suppress(OSError):
            begun_ns = path.stat().st_mtime_ns
            if not _delete(path):
                begun.append(begun_ns)
    return min(begun)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with _opened(folder / "lock", os.O_CREAT) as descriptor:
        end = time.monotonic() + _LOCK_WAIT_S
        while not take_lock(descriptor):
            if time.monotonic() >= end:
                raise LlamaclustError(f"{folder}: another process has had the lock for {_LOCK_WAIT_S:g} s")
            time.sleep(_LOCK_RETRY_S)
        yield


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def mark_whole(path: Path) -> None:
    """Marks a file whose bytes match its name; it counts as used now."""
    os.utime(path, ns=(time.time_ns(), _WHOLE_NS))


def _use(path: Path | int) -> None:
    now_ns = time.time_ns()
    os.utime(path, ns=(now_ns, now_ns))


def _used_ns(found: os.stat_result) -> int:
    """Of an unfinished file: when it was written to."""
    return found.st_atime_ns if found.st_mtime_ns == _WHOLE_NS else found.st_mtime_ns


def _delete(path: Path) -> bool:
    """Deletes a file that no process has locked. OSError if it is gone or cannot be deleted."""
    with _opened(path, os.O_NOFOLLOW | os.O_NONBLOCK) as descriptor:
        is_free = take_lock(descriptor)
        if is_free:
            path.unlink()
        return is_free
