"""Writes packed layers in the background at the lowest priority. At exit, the process waits only a limited time."""

from __future__ import annotations

import atexit
import contextlib
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock, Thread
from typing import TYPE_CHECKING
from weakref import ref

from llamaclust.core.disk_cache.cache import NoRoomError
from llamaclust.core.disk_cache.files import BusyError, StoppedError, Writing, reason
from llamaclust.core.process_settings import lower_priority
from llamaclust.kernels._native import Memory
from llamaclust.kernels.packed.cache_folder import Entry, PackedCacheFolder

if TYPE_CHECKING:
    from llamaclust.kernels.packed.packed_layer import PackedLayer

_log = logging.getLogger(__name__)

_LOWEST_PRIORITY = 19

_FINISH_S = 1.0
_STOP_S = 0.2


@dataclass(frozen=True, slots=True)
class Made:
    layer: PackedLayer
    key: str
    memory: ref[Memory]
    since_ns: int  # Time when the load began that packed the layer.


class BackgroundWriter:
    """Writes layers one by one on a thread. The thread ends when the queue is empty."""

    def __init__(self, folder: PackedCacheFolder) -> None:
        self.is_usable = True
        self._folder = folder
        self._queue: deque[Made] = deque()
        self._lock = Lock()
        self._thread: Thread | None = None
        self._writing = Writing()
        self._is_registered = False
        self._refused_ns: int | None = None  # Start of the load whose later layers are not written.

    def add(self, made: Iterable[Made]) -> None:
        with self._lock:
            self._queue.extend(each for each in made if each.since_ns != self._refused_ns)
            if self._queue and self._thread is None:
                if not self._is_registered:
                    atexit.register(_end, ref(self))
                    self._is_registered = True
                self._thread = Thread(target=self._run, name="write-packed-layers", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def end(self) -> None:
        """Drops the queue. Waits up to a second for the current write. If the write does not end, deletes its file."""
        with self._lock:
            self._queue.clear()
            thread = self._thread
        if thread is None:
            return
        thread.join(0.0 if self._writing.waits else _FINISH_S)
        self._writing.is_stopped = True
        thread.join(_STOP_S)
        unfinished = self._writing.unfinished
        if thread.is_alive() and unfinished is not None:  # The writer waits for the disk.
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def _run(self) -> None:
        try:
            self._write_queue()
        except Exception:  # noqa: BLE001  The thread's outermost function.
            _log.exception("packed layers are not cached on disk; the next load packs them again")
            with self._lock:
                self.is_usable, self._thread = False, None
                self._queue.clear()

    def _write_queue(self) -> None:
        lower_priority(_LOWEST_PRIORITY)
        while (made := self._next()) is not None:
            memory = made.memory()
            if memory is None:
                continue
            try:
                self._store(made, memory)
                continue
            except StoppedError:
                pass
            except NoRoomError as error:
                _log.info("packed layer %s and later layers are not cached on disk: %s", made.layer.name, error)
            except BusyError as error:
                _log.warning(
                    "packed layer %s and later layers are not cached on disk: %s", made.layer.name, error.strerror
                )
            except OSError as error:
                self.is_usable = False
                warn_not_kept(self._folder, error)
            with self._lock:
                self._refused_ns = made.since_ns
                self._queue.clear()

    def _store(self, made: Made, memory: Memory) -> None:
        if self._folder.find(made.key) is None:
            path, data = str(made.layer.tensors[0].origin.absolute()), memory.view.data
            image = sha256(data).hexdigest()
            entry = Entry(made.key, path, made.layer.name, image, len(data), memory.checksum())
            self._folder.store(entry, data, made.since_ns, self._writing)

    def _next(self) -> Made | None:
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._thread = None
            return None


def warn_not_kept(folder: PackedCacheFolder, error: OSError) -> None:
    what = f"{folder.path}: {reason(error)}" if error.filename is None and error.strerror else reason(error)
    _log.warning("packed layers are not cached on disk: %s; the next load packs them again", what)


def _end(writer: ref[BackgroundWriter]) -> None:
    found = writer()
    if found is not None:
        found.end()
