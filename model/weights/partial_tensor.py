"""One tensor on its way into the weight cache: written piece by piece, resumed, checked, only then under its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import sha256
from threading import Lock

from llamaclust.core.errors import LlamaclustError
from llamaclust.core.sizes import mib
from llamaclust.model.gguf.atomic_file import take_lock
from llamaclust.model.weights.cache import WeightCache, mark_whole

_READ_BYTES = 1 << 22


class WeightPart:
    """Open for writing by one process at a time. Every method blocks; they may be called from any thread.

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
