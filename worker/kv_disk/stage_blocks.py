"""Blocks of one stage on disk: finds, reads and writes them by key. For threads beside the one that computes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from llamaclust.kernels.packed.cache_files import NotAFileError, remove
from llamaclust.worker.kv_disk.folder import KvFolder, NoRoomError, mark_used
from llamaclust.worker.kv_disk.kv_file import SUFFIX, DamagedError, KvFile, KvLayers, block_bytes

_log = logging.getLogger(__name__)

_Place = tuple[KvFile, int]
"""A file and the number of a block in it."""


@dataclass(slots=True)
class KvTraffic:
    """Bytes of a process since its start, and of its folder."""

    written_bytes: int = 0
    read_bytes: int = 0
    used_bytes: int = 0  # of the folder, when it was last looked at


class StageBlocks:
    """Layers from `start` on, whose files lie in `path`. Other processes write and delete files there, too: layers of a
    block may come from several files, which other cuts of the model have written."""

    def __init__(self, folder: KvFolder, path: Path, start: int, traffic: KvTraffic) -> None:
        self._folder = folder
        self._path = path
        self._start = start
        self._traffic = traffic
        self._lock = Lock()
        self._files: dict[str, KvFile] = {}
        self._places: dict[bytes, list[_Place]] = {}
        self._unreadable: set[str] = set()  # names that were logged
        traffic.used_bytes = folder.used_bytes

    def find(self, keys: Sequence[bytes], kv: KvLayers) -> int:
        """How many of the blocks are there, from the first one on."""
        with self._lock:
            self._refresh()
            return next((index for index, key in enumerate(keys) if not self._cover(key, kv)), len(keys))

    def restore(self, keys: Sequence[bytes], blocks: Sequence[int], kv: KvLayers) -> int:
        """Reads blocks until one is missing or damaged; how many were read. Damaged files are deleted."""
        used: dict[str, KvFile] = {}
        done = 0
        for key, block in zip(keys, blocks, strict=True):
            with self._lock:
                places = self._cover(key, kv)
            if not places or not all(self._restored(place, kv, block) for place in places):
                break
            used |= {file.path.name: file for file, _ in places}
            done += 1
        mark_used(used.values())
        return done

    def save(self, keys: Sequence[bytes], blocks: Sequence[int], kv: KvLayers) -> int:
        """Writes those of the blocks that are not there; how many are there now. `keys` also has those of the blocks
        before, whose files stay."""
        with self._lock:
            self._refresh()
            own = zip(keys[-len(blocks) :], blocks, strict=True)
            missing = [(key, block) for key, block in own if not self._cover(key, kv)]
            chain = {file.path: file for key in keys for file, _ in self._cover(key, kv)}
        if missing:
            layer_bytes = tuple(map(block_bytes, kv))
            new = KvFile(self._path, self._start, self._start + len(kv), layer_bytes, tuple(key for key, _ in missing))
            try:
                written = self._folder.write(new, kv, [block for _, block in missing], chain)
            except (NoRoomError, OSError) as error:
                _log.warning("KV memory is not written to disk: %s", error)
                return 0
            self._traffic.written_bytes += written.size_bytes
            self._traffic.used_bytes = self._folder.used_bytes
            with self._lock:
                self._learn(written)
            chain[written.path] = written
        mark_used(chain.values())
        return len(blocks)

    def _restored(self, place: _Place, kv: KvLayers, block: int) -> bool:
        file, index = place
        try:
            self._traffic.read_bytes += file.restore(index, kv, self._start, block)
            return True
        except DamagedError as error:
            _log.warning("%s: %s; it is deleted, and what it held is computed again", file.path, error)
            remove(file.path)
        except OSError as error:
            _log.warning("%s cannot be read, what it held is computed again: %s", file.path, error)
        with self._lock:
            self._forget(file.path.name)
        return False

    def _cover(self, key: bytes, kv: KvLayers) -> list[_Place]:
        """Places that together hold all layers of a block; none where some layer is missing."""
        layer, end = self._start, self._start + len(kv)
        chosen: list[_Place] = []
        places = self._places.get(key, ())
        while layer < end:
            best = max((place for place in places if place[0].start <= layer), key=lambda p: p[0].end, default=None)
            if best is None or best[0].end <= layer or not _fits(best[0], self._start, kv):
                return []
            chosen.append(best)
            layer = best[0].end
        return chosen

    def _refresh(self) -> None:
        """Learns which files came and went."""
        names = {path.name for path in self._path.glob(f"*{SUFFIX}")}
        for gone in self._files.keys() - names:
            self._forget(gone)
        for name in names - self._files.keys():
            path = self._path / name
            try:
                self._learn(KvFile.read(path))
            except (FileNotFoundError, NotAFileError):
                continue
            except DamagedError as error:
                _log.warning("%s: %s; it is deleted", path, error)
                remove(path)
            except OSError as error:  # of a bad sector, or for want of descriptors: the other files serve
                if name not in self._unreadable:
                    _log.warning("%s", error)
                    self._unreadable.add(name)

    def _learn(self, file: KvFile) -> None:
        if file.path.name in self._files:
            return
        self._files[file.path.name] = file
        for index, key in enumerate(file.keys):
            self._places.setdefault(key, []).append((file, index))

    def _forget(self, name: str) -> None:
        file = self._files.pop(name, None)
        for key in () if file is None else frozenset(file.keys):
            left = [place for place in self._places[key] if place[0] is not file]
            if left:
                self._places[key] = left
            else:
                del self._places[key]


def _fits(file: KvFile, first_layer: int, kv: KvLayers) -> bool:
    """Whether its blocks have the size that KV memory of the same layers has."""
    layers = range(max(file.start, first_layer), min(file.end, first_layer + len(kv)))
    return all(file.layer_bytes[layer - file.start] == block_bytes(kv[layer - first_layer]) for layer in layers)
