"""The four kinds of disk caches, with the methods that the program uses to store and find data."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from llamaclust.core.disk_cache.cache import DiskCache
from llamaclust.core.disk_cache.files import Writing
from llamaclust.kernels._native import Memory
from llamaclust.kernels.cuda.runtime.cubin_cache import KernelFolder
from llamaclust.kernels.cuda.runtime.nvrtc import Binary
from llamaclust.kernels.packed.cache import PackedCache, _Found
from llamaclust.kernels.packed.cache_folder import Entry, PackedCacheFolder
from llamaclust.model.weights.cache import WeightCache
from llamaclust.worker.kv_disk.folder import KvFolder
from llamaclust.worker.kv_disk.stage_blocks import KvTraffic, StageBlocks

ROOM = 1 << 30

BYTES = 20_000
"""Size of a file's payload."""


def data(number: int, n_bytes: int = BYTES) -> bytes:
    return np.random.default_rng(number).bytes(n_bytes)


class User(Protocol):
    """A cache with numbered files. `overhead_bytes` is the largest size of a file without its payload."""

    suffix: str  # Suffix of the file with the payload.
    overhead_bytes: int

    @property
    def cache(self) -> DiskCache: ...

    def put(self, number: int, n_bytes: int = BYTES) -> None:
        """Stores a file. Raises OSError if it cannot be stored."""

    def get(self, number: int, n_bytes: int = BYTES) -> bytes | None:
        """Returns the payload, or None if the file is missing or damaged."""


class PackedUser:
    suffix = ".tiles"
    overhead_bytes = 300

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.cache = PackedCacheFolder(path, most_bytes)
        self._reader = PackedCache(self.cache)

    def put(self, number: int, n_bytes: int = BYTES) -> None:
        memory = Memory(n_bytes)
        memory.view[:] = np.frombuffer(data(number, n_bytes), np.uint8)
        image = sha256(memory.view.data).hexdigest()
        entry = Entry(f"{number}", "m.gguf", "blk.0", image, n_bytes, memory.checksum())
        self.cache.store(entry, memory.view.data, 1 << 63, Writing())

    def get(self, number: int, n_bytes: int = BYTES) -> bytes | None:
        entry = self.cache.find(f"{number}")
        layer: Any = SimpleNamespace(name="blk.0")
        memory = None if entry is None else self._reader._checked(_Found(layer, entry))
        return None if memory is None else memory.view.tobytes()


class WeightsUser:
    suffix, overhead_bytes = ".weights", 0

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.cache = WeightCache(path, most_bytes)

    def put(self, number: int, n_bytes: int = BYTES) -> None:
        content = data(number, n_bytes)
        self.cache.write(self.cache.place(sha256(content).hexdigest()).name, [content])

    def get(self, number: int, n_bytes: int = BYTES) -> bytes | None:
        content = sha256(data(number, n_bytes)).hexdigest()
        try:
            return None if self.cache.find(content) is None else self.cache.place(content).read_bytes()
        except FileNotFoundError:  # The file was deleted meanwhile.
            return None


class KvUser:
    suffix = ".kv"
    overhead_bytes = 200

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.cache = KvFolder(path, most_bytes)

    def put(self, number: int, n_bytes: int = BYTES) -> None:
        kv = [[np.frombuffer(data(number, n_bytes), np.uint8)[None]]]
        if not self._stage().save([self._key(number)], [0], kv):
            raise OSError("not saved")

    def get(self, number: int, n_bytes: int = BYTES) -> bytes | None:
        stage, kv = self._stage(), [[np.zeros((1, n_bytes), np.uint8)]]
        stage.find([self._key(number)], kv)
        return kv[0][0].tobytes() if stage.restore([self._key(number)], [0], kv) else None

    def _stage(self) -> StageBlocks:
        return StageBlocks(self.cache, "ab" * 32, 0, KvTraffic())

    @staticmethod
    def _key(number: int) -> bytes:
        return sha256(bytes([number])).digest()


class KernelsUser:
    suffix, overhead_bytes = ".cubin", 0

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.cache = KernelFolder(path)
        object.__setattr__(self.cache, "most_bytes", most_bytes)

    def put(self, number: int, n_bytes: int = BYTES) -> None:
        self.cache.keep(f"rows-{number}", Binary("cubin", data(number, n_bytes)))

    def get(self, number: int, n_bytes: int = BYTES) -> bytes | None:
        try:
            path = self.cache.find(f"rows-{number}")
            return None if path is None else path.read_bytes()
        except FileNotFoundError:
            return None


USERS: dict[str, Callable[[Path, int], User]] = {
    "packed": PackedUser,
    "weights": WeightsUser,
    "kv": KvUser,
    "kernels": KernelsUser,
}

Make = Callable[..., User]
"""Opens a cache with space for a number of files."""


def there(user: User, numbers: range) -> list[int]:
    return [number for number in numbers if user.get(number) is not None]


def main_file(user: User) -> Path:
    """Returns the largest file, which has the payload."""
    return max(user.cache.files(), key=lambda file: file.size_bytes).path


def unfinished(user: User) -> list[Path]:
    return list(user.cache.path.glob("*.tmp"))
