"""Tensors in model files. Bytes are read with pread and never mapped, so a truncated file is an error, not a crash."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np

from llamaclust.core.cgroups import drop_cached_pages
from llamaclust.core.errors import ModelFileError
from llamaclust.core.regular_file import NotRegularError, open_descriptor
from llamaclust.model.quant_types import TILE_ROWS, QuantType
from llamaclust.model.shard_names import named_range

_LAYER = re.compile(r"(adapter\.\d+\.)?blk\.[^.]+(?=\.)")
_READ_BYTES = 1 << 26
"""The maximum number of bytes in a read call. Loading can be interrupted between calls."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """The identity of a file. Comparisons ignore `changed_ns`, the inode's change time (ctime), which also changes with
    links and permissions."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int = field(default=0, compare=False)

    @classmethod
    def of(cls, descriptor: int) -> FileIdentity:
        return cls.from_status(os.fstat(descriptor))

    @classmethod
    def from_status(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Yields a read-only descriptor. Raises ModelFileError if the file is not regular, because a pipe would block."""
    try:
        descriptor = open_descriptor(path)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; check the path") from None
    except ValueError:
        raise ModelFileError(f"{str(path)!a}: not a file name; check the path") from None
    except NotRegularError:
        raise ModelFileError(f"{path}: not a regular file; give the path of a .gguf file") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be opened: {error.strerror}; check its permissions") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, path: Path, offset: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done : done + _READ_BYTES]], offset + done)
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be read at byte {offset + done}: {error.strerror}") from error
        if count == 0:
            wanted = offset + len(buffer)
            raise ModelFileError(f"{path}: the file ends at byte {offset + done}, expected {wanted}; it was cut short")
        done += count


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a model file, whose bytes are read later. `shape` is row-major, slowest dimension first: GGUF's ne =
    [k, n] is (n, k).

    content: the SHA-256 of the tensor's bytes in hex, if known.
    paired_heads: the number of heads whose halves are interleaved on reading, or 0.
    packed_as: the type of the packed tiles if it is not `quant_type` (see `WIDER_TILES`).
    stride_bytes: the distance in the file between entries of the slowest dimension. 0 means that they are contiguous.
    stored: the rows and columns in the file, if the matrix is transposed on reading."""

    name: str
    quant_type: QuantType
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int
    file_identity: FileIdentity
    content: str | None = None
    paired_heads: int = 0
    packed_as: QuantType | None = None
    stride_bytes: int = 0
    stored: tuple[int, int] | None = None

    @property
    def tile_type(self) -> QuantType:
        return self.quant_type if self.packed_as is None else self.packed_as

    @property
    def place(self) -> tuple[object, ...]:
        """A key that identifies the tensor's bytes within its file."""
        place = self.offset, self.n_bytes, self.shape
        if self.stride_bytes:
            return (*place, "stride", self.stride_bytes)
        if self.stored is not None:
            return (*place, "stored", self.stored)
        return (*place, self.paired_heads) if self.paired_heads else place

    @property
    def source(self) -> tuple[object, ...]:
        """A key that identifies the current version of the tensor's file."""
        if self.content is not None:
            return (self.content,)
        return self.path, self.file_identity, self.file_identity.changed_ns

    @property
    def origin(self) -> Path:
        return self.path if self.content is None else self.path.parent

    @property
    def layer(self) -> str | None:
        """The prefix of the tensor's layer, such as `blk.7` or `adapter.0.blk.7`. None outside the layers."""
        found = _LAYER.match(self.name)
        return None if found is None else found[0]

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.quant_type.info.row_bytes(self.shape[-1])

    @property
    def resident_bytes(self) -> int:
        """The tensor's size in memory in bytes. Vectors are float32, and matrices are tiles of sixteen rows."""
        if len(self.shape) == 1:
            return 4 * self.shape[0]
        *count, rows, width = self.shape
        return prod(count) * -(-rows // TILE_ROWS) * self.tile_type.info.tile_bytes(width)

    def shard(self, name: str) -> Tensor:
        if (found := named_range(name)) is None:
            return self
        assert self.stored is None, self.name
        dimension, part = found
        outer, inner = self.shape[:dimension], self.shape[dimension:]
        count = inner[0]
        head_rows = count // self.paired_heads if self.paired_heads else 1
        assert 0 <= part.start < part.stop <= count, (name, self.shape)
        assert part.start % head_rows == part.stop % head_rows == 0, (name, self.shape)
        stride = self.n_bytes // prod(outer)
        each = stride // count
        return replace(
            self,
            name=name,
            shape=(*outer, len(part), *inner[1:]),
            offset=self.offset + part.start * each,
            n_bytes=prod(outer) * len(part) * each,
            stride_bytes=stride if outer else 0,
            paired_heads=len(part) // head_rows if self.paired_heads else 0,
            content=None,
        )

    def read(self) -> bytes:
        return self.read_range(0, self.n_bytes)

    def read_range(self, start: int, end: int) -> bytes:
        buffer = bytearray(end - start)
        self.read_into(buffer, start)
        return bytes(buffer)

    def read_into(self, buffer: bytearray | memoryview, start: int = 0) -> None:
        view = memoryview(buffer).cast("B")
        assert 0 <= start <= start + len(view) <= self.n_bytes
        with open_regular(self.path) as descriptor:
            self._check(descriptor)
            for at, part in self._parts(view, start):
                if self.paired_heads:
                    self._read_paired(descriptor, part, start)
                elif self.stored is not None:
                    self._read_transposed(descriptor, part, start, *self.stored)
                else:
                    read_exactly(descriptor, self.path, at, part)
                drop_cached_pages(descriptor, at, len(part))
            self._check(descriptor)

    def _parts(self, view: memoryview, start: int) -> Iterator[tuple[int, memoryview]]:
        each = self.n_bytes // self.shape[0] if self.stride_bytes else self.n_bytes
        while len(view):
            index, skipped = divmod(start, each)
            count = min(each - skipped, len(view))
            yield self.offset + index * self.stride_bytes + skipped, view[:count]
            view, start = view[count:], start + count

    def _read_paired(self, descriptor: int, view: memoryview, start: int) -> None:
        head_bytes = self.n_bytes // self.paired_heads
        first, last = start // head_bytes, -(-(start + len(view)) // head_bytes)
        halves = np.empty((last - first, 2, head_bytes // 2 // self.row_bytes, self.row_bytes), np.uint8)
        read_exactly(descriptor, self.path, self.offset + first * head_bytes, halves.data.cast("B"))
        begin = start - first * head_bytes
        view[:] = halves.swapaxes(1, 2).tobytes()[begin : begin + len(view)]

    def _read_transposed(self, descriptor: int, view: memoryview, start: int, rows: int, columns: int) -> None:
        item_bytes = self.quant_type.info.block_bytes
        matrix_bytes = rows * columns * item_bytes
        first, last = start // matrix_bytes, -(-(start + len(view)) // matrix_bytes)
        found = np.empty((last - first, rows, columns, item_bytes), np.uint8)
        read_exactly(descriptor, self.path, self.offset + first * matrix_bytes, found.data.cast("B"))
        begin = start - first * matrix_bytes
        view[:] = found.swapaxes(1, 2).tobytes()[begin : begin + len(view)]

    def _check(self, descriptor: int) -> None:
        now = FileIdentity.of(descriptor)
        if now == self.file_identity:
            return
        was = self.file_identity
        what = (
            f"shrank from {was.size_bytes} to {now.size_bytes} bytes" if now.size_bytes < was.size_bytes else "changed"
        )
        raise ModelFileError(
            f"{self.path}: {what} since it was opened (reading {self.name}); restore it, or start again"
        )
