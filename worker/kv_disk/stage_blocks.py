"""Finds, reads and writes the KV blocks of one stage on disk by key, outside the computing thread."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from threading import Lock

from llamaclust.core.disk_cache.files import reason
from llamaclust.worker.kv_disk.folder import KvFolder
from llamaclust.worker.kv_disk.kv_file import DamagedError, KvFile, KvLayers, block_bytes

_log = logging.getLogger(__name__)

_Place = tuple[KvFile, int]


@dataclass(slots=True)
class KvTraffic:
    written_bytes: int = 0
    read_bytes: int = 0
    used_bytes: int = 0  # Size of the folder at the last check.


class StageBlocks:
    """A stage's KV blocks on disk. `content` is the digest in file names, and `start` is the stage's first layer."""

    def __init__(self, folder: KvFolder, content: str, start: int, traffic: KvTraffic) -> None:
        self._folder = folder
        self._content = content
        self._start = start
        self._traffic = traffic
        self._lock = Lock()
        self._files: dict[str, KvFile] = {}
        self._places: dict[bytes, list[_Place]] = {}
        self._unreadable: set[str] = set()  # Names of unreadable files that the log has already reported.
        self._is_reported = False  # True if the log has already reported that nothing can be written.
        traffic.used_bytes = folder.used_bytes

    def find(self, keys: Sequence[bytes], kv: KvLayers) -> int:
        """Returns the number of leading keys whose blocks are on disk, and marks their files as used."""
        with self._lock:
            self._refresh()
            found = list(takewhile(bool, (self._cover(key, kv) for key in keys)))
        self._folder.mark_used([*dict.fromkeys(file.name for places in found for file, _ in places)])
        return len(found)

    def restore(self, keys: Sequence[bytes], blocks: Sequence[int], kv: KvLayers) -> int:
        """Reads blocks until one is missing or damaged. Returns the number of blocks read. Deletes damaged files."""
        done = 0
        for key, block in zip(keys, blocks, strict=True):
            with self._lock:
                places = self._cover(key, kv)
            if not places or not all(self._restored(place, kv, block) for place in places):
                break
            done += 1
        return done

    def save(self, keys: Sequence[bytes], blocks: Sequence[int], kv: KvLayers) -> int:
        """Writes missing `blocks` to disk. The last keys belong to `blocks`. Returns len(blocks), or 0 on failure."""
        with self._lock:
            self._refresh()
            own = zip(keys[-len(blocks) :], blocks, strict=True)
            missing = [(key, block) for key, block in own if not self._cover(key, kv)]
            chain = dict.fromkeys(file.name for key in keys for file, _ in self._cover(key, kv))
        if missing:
            layer_bytes = tuple(map(block_bytes, kv))
            new_keys, new_blocks = zip(*missing, strict=True)
            name = self._folder.new_name(self._content)
            new = KvFile(name, self._start, self._start + len(kv), layer_bytes, new_keys)
            try:
                self._folder.write(name, new.parts(kv, new_blocks), kept=chain)
            except OSError as error:
                if not self._is_reported:
                    _log.warning("KV memory is not written to disk: %s", reason(error))
                self._is_reported = True
                return 0
            self._is_reported = False
            self._traffic.written_bytes += new.size_bytes
            self._traffic.used_bytes = self._folder.used_bytes
            with self._lock:
                self._learn(new)
            chain[name] = None
        self._folder.mark_used([*chain])
        return len(blocks)

    def _restored(self, place: _Place, kv: KvLayers, block: int) -> bool:
        known, index = place
        try:
            file = self._folder.open(known.name, is_use=False)
            if file is not None:
                with file:
                    self._traffic.read_bytes += known.restore(file, index, kv, self._start, block)
                return True
        except DamagedError as error:
            self._folder.drop(known.name, f"{error}; its KV memory is computed again")
        except OSError as error:
            _log.warning("%s cannot be read, and its KV memory is computed again: %s", known.name, reason(error))
        with self._lock:
            self._forget(known.name)
        return False

    def _cover(self, key: bytes, kv: KvLayers) -> list[_Place]:
        """Returns places in files that together hold all layers of a block, or [] if a layer is missing."""
        layer, end = self._start, self._start + len(kv)
        chosen: list[_Place] = []
        places = [place for place in self._places.get(key, ()) if _fits(place[0], self._start, kv)]
        while layer < end:
            best = max((place for place in places if place[0].start <= layer), key=lambda p: p[0].end, default=None)
            if best is None or best[0].end <= layer:
                return []
            chosen.append(best)
            layer = best[0].end
        return chosen

    def _refresh(self) -> None:
        names = self._folder.names(self._content)
        for gone in self._files.keys() - names:
            self._forget(gone)
        for name in names - self._files.keys():
            try:
                file = self._folder.open(name, is_use=False)
                if file is not None:
                    with file:
                        self._learn(KvFile.read(name, file))
            except DamagedError as error:
                self._folder.drop(name, str(error))
            # For example a bad sector, or too few file descriptors. The other files can still be used.
            except OSError as error:
                if name not in self._unreadable:
                    _log.warning("%s", error)
                    self._unreadable.add(name)

    def _learn(self, file: KvFile) -> None:
        if file.name in self._files:
            return
        self._files[file.name] = file
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
    layers = range(max(file.start, first_layer), min(file.end, first_layer + len(kv)))
    return all(file.layer_bytes[layer - file.start] == block_bytes(kv[layer - first_layer]) for layer in layers)
