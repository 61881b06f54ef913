"""Files of KV memory. A file has full blocks of the layers [start, end), and a digest for each layer of each block.

    0   "LCKV" | version u32 | start u32 | end u32 | blocks u32
    20  bytes of a block in each layer, u32 [end - start]           little-endian
        keys, 32 bytes [blocks]
        digests, SHA-256 [blocks, end - start]: of the block's key, the layer u32, and the layer's bytes
        SHA-256 of everything before
        the blocks [blocks, layers], without gaps

A file never changes, but may be damaged. Data with a wrong digest is not used."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.bounds import MAX_LAYERS
from llamaclust.wire.control.kv_disk import KEY_BYTES, MAX_KEYS

_MAGIC, _VERSION = b"LCKV", 1
_PREFIX = struct.Struct("<4s4I")
_DIGEST_BYTES = 32
_MOST_BUFFERS = 512  # Maximum number of buffers in one system call.

KvLayers = Sequence[Sequence[NDArray[np.uint8]]]
"""A stage's KV memory. Each layer has parts (keys, values, states), which are arrays [KV blocks, bytes]."""


class DamagedError(Exception):
    """A file's header or data is damaged, or its size is wrong."""


@dataclass(frozen=True, slots=True)
class KvFile:
    """A file's header. `layer_bytes[i]` is the size of one block in layer start + i, with keys, values and states."""

    name: str
    start: int
    end: int
    layer_bytes: tuple[int, ...]
    keys: tuple[bytes, ...]

    @property
    def _digests_at(self) -> int:
        return _PREFIX.size + 4 * len(self.layer_bytes) + KEY_BYTES * len(self.keys)

    @property
    def _data_at(self) -> int:
        return self._digests_at + _DIGEST_BYTES * (len(self.keys) * len(self.layer_bytes) + 1)

    @property
    def size_bytes(self) -> int:
        return self._data_at + len(self.keys) * sum(self.layer_bytes)

    @classmethod
    def read(cls, name: str, file: FileIO) -> KvFile:
        """Reads a header. Raises OSError, or DamagedError if the header is damaged or contradicts the file's size."""
        prefix = _read(file, 0, _PREFIX.size)
        magic, version, start, end, blocks = _PREFIX.unpack(prefix)
        if (magic, version) != (_MAGIC, _VERSION) or not (start < end <= MAX_LAYERS and 0 < blocks <= MAX_KEYS):
            raise DamagedError("the file does not begin with the header of a KV memory file")
        sizes = _read(file, _PREFIX.size, 4 * (end - start))
        keys = _read(file, _PREFIX.size + len(sizes), KEY_BYTES * blocks)
        layer_bytes = struct.unpack(f"<{end - start}I", sizes)
        split = tuple(keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES))
        found = cls(name, start, end, layer_bytes, split)
        digests = _read(file, found._digests_at, found._data_at - found._digests_at)
        if sha256(prefix + sizes + keys + digests[:-_DIGEST_BYTES]).digest() != digests[-_DIGEST_BYTES:]:
            raise DamagedError("the file's header is damaged")
        if os.fstat(file.fileno()).st_size != found.size_bytes:
            raise DamagedError("the file's size differs from the size in its header")
        return found

    def parts(self, kv: KvLayers, blocks: Sequence[int]) -> list[bytes | memoryview]:
        header = _PREFIX.pack(_MAGIC, _VERSION, self.start, self.end, len(self.keys))
        header += struct.pack(f"<{len(self.layer_bytes)}I", *self.layer_bytes) + b"".join(self.keys)
        for key, block in zip(self.keys, blocks, strict=True):
            header += b"".join(_digest(key, self.start + i, _block(layer, block)) for i, layer in enumerate(kv))
        header += sha256(header).digest()
        return [header, *(part[block].data for block in blocks for layer in kv for part in layer)]

    def restore(self, file: FileIO, index: int, kv: KvLayers, first_layer: int, block: int) -> int:
        """Reads block `index` of the file into block `block` of `kv`, whose first layer is `first_layer`. Returns the
        number of bytes read. Raises DamagedError or OSError."""
        count = len(self.layer_bytes)
        layers = range(max(self.start, first_layer), min(self.end, first_layer + len(kv)))
        targets = [_block(kv[layer - first_layer], block) for layer in layers]
        first, last = layers.start - self.start, layers.stop - self.start
        offsets = (0, *accumulate(self.layer_bytes))
        digests = _read(file, self._digests_at + _DIGEST_BYTES * (index * count + first), _DIGEST_BYTES * len(layers))
        data_at = self._data_at + index * offsets[-1] + offsets[first]
        _read_into(file, data_at, [part for target in targets for part in target])
        for layer, target, known in zip(layers, targets, _split(digests), strict=True):
            if _digest(self.keys[index], layer, target) != known:
                raise DamagedError(f"layer {layer} of a block is damaged")
        return offsets[last] - offsets[first]


def block_bytes(layer: Sequence[NDArray[np.uint8]]) -> int:
    return sum(part.shape[1] for part in layer)


def _block(layer: Sequence[NDArray[np.uint8]], block: int) -> list[NDArray[np.uint8]]:
    return [part[block] for part in layer]


def _digest(key: bytes, layer: int, parts: Sequence[NDArray[np.uint8]]) -> bytes:
    digest = sha256(key + struct.pack("<I", layer))
    for part in parts:
        digest.update(part.data)
    return digest.digest()


def _split(digests: bytes) -> list[bytes]:
    return [digests[at : at + _DIGEST_BYTES] for at in range(0, len(digests), _DIGEST_BYTES)]


def _read(file: FileIO, at: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, at)
    if len(data) != size:
        raise DamagedError(f"the file ends at byte {at + len(data)}, expected {at + size} or more")
    return data


def _read_into(file: FileIO, at: int, targets: Sequence[NDArray[np.uint8]]) -> None:
    for first in range(0, len(targets), _MOST_BUFFERS):
        some = targets[first : first + _MOST_BUFFERS]
        expected = sum(target.nbytes for target in some)
        if os.preadv(file.fileno(), [target.data for target in some], at) != expected:
            raise DamagedError(f"the file ends before byte {at + expected}")
        at += expected
