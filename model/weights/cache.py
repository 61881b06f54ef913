"""The folder of fetched weights, which a machine's processes share. It has tensors by SHA-256, and manifests of models.
A file gets its name only when it is complete, checked and on disk."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from io import FileIO
from pathlib import Path
from threading import Lock

from llamaclust.core.disk_cache.cache import NEVER_NS, DiskCache, NoRoomError
from llamaclust.core.disk_cache.files import delete_unlocked, mark_used, open_own, remove
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.regular_file import take_lock, take_lock_within
from llamaclust.core.sizes import mib
from llamaclust.model.gguf.tensors import FileIdentity

WHOLE, UNFINISHED, KNOWN, MAKING = ".weights", ".part", ".manifest", ".lock"

MAKING_WAIT_S = 10.0
"""Maximum seconds to wait for another process that reads a model file for its manifest. It is shorter than deadlines of
loads, which only this process's own reading extends."""
_LEASE = ".load"
_MODIFIED_NS = 1_000_000_000 * 10**9
_READ_BYTES = 1 << 22
_HASH = re.compile("[0-9a-f]{64}")


class WeightCache(DiskCache):
    suffixes = (WHOLE, UNFINISHED, KNOWN, MAKING)
    content, limit = "weights", "LLAMACLUST_WEIGHTS_SIZE"
    free_bytes = 0  # Weights may fill the disk, because a load needs them.
    modified_ns = _MODIFIED_NS  # Files get this time, so a changed file is found without computing its digest again.

    def prepare(self) -> None:
        with self._errors():
            self.create()

    def place(self, content: str) -> Path:
        assert _HASH.fullmatch(content)
        return self.path / f"{content}{WHOLE}"

    def part_path(self, content: str) -> Path:
        return self.place(content).with_suffix(UNFINISHED)

    def part_bytes(self, content: str) -> int:
        """Returns the size of an unfinished tensor in bytes, or 0 if there is none. Marks it as recently used."""
        try:
            with open_own(self.part_path(content), os.O_RDWR) as file:
                if take_lock(file.fileno()):
                    mark_used(file.fileno())
                return os.fstat(file.fileno()).st_size
        except OSError:
            return 0

    def find(self, content: str) -> FileIdentity | None:
        """Marks a tensor's file as used and returns its identity. Returns None if the file is missing or changed."""
        with suppress(OSError):
            file = self.open(self.place(content).name)
            if file is not None:
                with file:
                    return FileIdentity.of(file.fileno())
        return None

    def known_manifest(self, key: str) -> str | None:
        assert _HASH.fullmatch(key)
        try:
            content = (self.read(f"{key}{KNOWN}", 65) or b"").decode("ascii")
        except (OSError, ValueError):
            return None
        return content if _HASH.fullmatch(content) and self.find(content) is not None else None

    def keep_manifest(self, key: str, data: bytes) -> str:
        content = sha256(data).hexdigest()
        self._write(self.place(content).name, data)
        self.remember_manifest(key, content)
        return content

    def remember_manifest(self, key: str, content: str) -> None:
        assert _HASH.fullmatch(key)
        if self.known_manifest(key) != content:
            (self.path / f"{key}{KNOWN}").unlink(missing_ok=True)
            self._write(f"{key}{KNOWN}", content.encode())

    def _write(self, name: str, data: bytes) -> None:
        with self._errors():
            self.write(name, [data])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps `make_room` from deleting files that the `with` block finds or writes."""
        self.prepare()
        path = self.path / f"{secrets.token_hex(8)}{_LEASE}"
        with ExitStack() as stack:
            with self._errors(), self.locked():  # A lease without a lock belongs to a process that has ended.
                lease = stack.enter_context(open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
                stack.callback(path.unlink, missing_ok=True)
                take_lock(lease.fileno())
                now_ns = time.time_ns()
                os.utime(lease.fileno(), ns=(now_ns, now_ns))
            yield

    def make_room(self, n_bytes: int) -> None:
        """Deletes the least recently used files that no load needs. Raises LlamaclustError if space is still short."""
        with self._errors(), self.locked():
            self._make_room(n_bytes)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except NoRoomError as error:
            raise LlamaclustError(str(error)) from error
        except OSError as error:
            raise LlamaclustError(f"{self.path}: weights cannot be stored there: {error.strerror}") from error

    def _needed_since_ns(self) -> int:
        begun = [NEVER_NS]
        for lease in self.files(_LEASE):
            with suppress(OSError):
                begun_ns = lease.path.stat().st_mtime_ns
                if not delete_unlocked(lease.path):
                    begun.append(begun_ns)
        return min(begun)

    @contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Locks the manifest of `key`, so that only one process makes it. After waiting for `MAKING_WAIT_S`, continues
        without the lock, in case the holder hangs or is slow."""
        path = self.path / f"{key}{MAKING}"
        with ExitStack() as stack:
            with self._errors():
                if _take_next(path, stack):
                    stack.callback(path.unlink, missing_ok=True)
            yield


def _take_next(path: Path, stack: ExitStack) -> bool:
    """Locks a file that its holder deletes before unlocking it. Returns False if the lock is not free in time."""
    while True:
        file = stack.enter_context(open_own(path, os.O_RDWR | os.O_CREAT))
        if not take_lock_within(file.fileno(), MAKING_WAIT_S):
            return False
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return True
        file.close()


class WeightPart:
    """An unfinished tensor in the cache. Only one process writes it, piece by piece. Methods block, and any thread may
    call them. `resumed` is True if some of `done_bytes` were written earlier."""

    def __init__(self, cache: WeightCache, content: str, n_bytes: int, file: FileIO) -> None:
        self._cache = cache
        self._content = content
        self._path = cache.part_path(content)
        self._n_bytes = n_bytes
        self._file = file
        self._lock = Lock()
        self._hash = sha256()
        self.done_bytes = 0
        self.resumed = False

    @classmethod
    def open(cls, cache: WeightCache, content: str, n_bytes: int) -> WeightPart | None:
        """Opens a tensor for writing. Returns None if another process has it. Raises LlamaclustError on I/O errors."""
        path = cache.part_path(content)
        try:
            file = open_own(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise LlamaclustError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            is_ours = take_lock(file.fileno()) and os.fstat(file.fileno()).st_ino == path.stat().st_ino
            if is_ours and cache.find(content) is not None:  # Another process finished just before the open.
                path.unlink()
                is_ours = False
        except OSError:  # Another process finished or deleted the file after the open.
            is_ours = False
        if not is_ours:
            file.close()
            return None
        part = cls(cache, content, n_bytes, file)
        try:
            part._take_in()
        except OSError as error:
            raise part._failed(error) from error
        return part

    def write(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Appends pieces to the file. If the disk is full or fails, deletes the file and raises LlamaclustError."""
        with self._lock:
            if self._file.closed:
                return
            for piece in pieces:
                try:
                    self._write(memoryview(piece))
                except OSError as error:
                    raise self._failed(error) from error

    def finish(self) -> bool:
        with self._lock:
            try:
                if self.done_bytes != self._n_bytes or self._hash.hexdigest() != self._content:
                    self._file.truncate(0)
                    self._hash, self.done_bytes, self.resumed = sha256(), 0, False
                    return False
                os.fsync(self._file.fileno())
                os.utime(self._file.fileno(), ns=(time.time_ns(), _MODIFIED_NS))
                self._path.rename(self._cache.place(self._content))
            except OSError as error:
                raise self._failed(error) from error
            return True

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _take_in(self) -> None:
        if os.fstat(self._file.fileno()).st_size > self._n_bytes:
            self._file.truncate(0)
            return
        while data := os.pread(self._file.fileno(), _READ_BYTES, self.done_bytes):
            self._hash.update(data)
            self.done_bytes += len(data)
        self.resumed = self.done_bytes > 0

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            count = os.pwrite(self._file.fileno(), data[done:], self.done_bytes)
            self._hash.update(data[done : done + count])
            done += count
            self.done_bytes += count

    def _failed(self, error: OSError) -> LlamaclustError:
        remove(self._path)
        self._file.close()
        what = f"{mib(self._n_bytes)} MiB of weights cannot be written: {(error.strerror or str(error)).lower()}"
        return LlamaclustError(f"{self._cache.path}: {what}; make room there, or set LLAMACLUST_HOME to another disk")
