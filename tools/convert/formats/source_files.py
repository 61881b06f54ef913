"""Files of a checkpoint, each opened once, read with pread, and checked for changes at the end."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.tensors import FileIdentity, open_regular, read_exactly
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.lazy import MAX_DIMENSIONS, Array, Lazy, Recent, Storage

_MAX_JSON_BYTES: Final = 1 << 27


@dataclass(frozen=True, slots=True)
class SourceFile:
    """An open file."""

    path: Path
    descriptor: int
    size_bytes: int

    def read(self, offset: int, count: int) -> bytes:
        """Bytes [offset, offset + count); ModelFileError where the file ends before."""
        if offset < 0 or count < 0 or offset + count > self.size_bytes:
            raise self.error(f"{count} bytes from byte {offset} on are needed, it has {self.size_bytes}: cut short")
        buffer = bytearray(count)
        read_exactly(self.descriptor, self.path, offset, memoryview(buffer))
        return bytes(buffer)

    def tensor(self, name: str, offset: int, shape: tuple[int, ...], storage: Storage) -> Lazy:
        """A tensor with contiguous rows from `offset` on."""
        origin = f"{self.path}: tensor {shown(name)}"
        if not 0 < len(shape) <= MAX_DIMENSIONS or min(shape) < 1:
            raise ModelFileError(f"{origin}: shape {list(shape)}; 1 to {MAX_DIMENSIONS} dimensions expected, none 0")
        row_bytes = prod(shape[1:]) * storage.dtype.itemsize
        if offset < 0 or offset + shape[0] * row_bytes > self.size_bytes:
            end = offset + shape[0] * row_bytes
            raise ModelFileError(f"{origin}: ends at byte {end}, the file at byte {self.size_bytes}: it was cut short")

        def read(start: int, end: int) -> Array:
            values = np.empty((end - start, *shape[1:]), storage.dtype)
            if values.size:
                view = values.data.cast("B")
                read_exactly(self.descriptor, self.path, offset + start * row_bytes, view)
            return values

        return Lazy(shape, storage, read, origin)

    def error(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}")


class SourceFiles:
    """Opens files and closes them at the end. `recent` caches tensors that are read whole."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._open: dict[Path, tuple[SourceFile, FileIdentity]] = {}
        self.recent = Recent()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def open(self, path: Path) -> SourceFile:
        if path not in self._open:
            descriptor = self._stack.enter_context(open_regular(path))
            identity = FileIdentity.of(descriptor)
            self._open[path] = SourceFile(path, descriptor, identity.size_bytes), identity
        return self._open[path][0]

    def check_unchanged(self) -> None:
        """ModelFileError if a file was modified since it was opened."""
        for file, identity in self._open.values():
            if FileIdentity.of(file.descriptor) != identity:
                raise file.error("changed while it was read; try again when it is complete")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelFileError where it is something else."""
    with open_regular(path) as descriptor:
        size = FileIdentity.of(descriptor).size_bytes
        if size > _MAX_JSON_BYTES:
            raise ModelFileError(f"{path}: {size >> 20} MiB of JSON, at most {_MAX_JSON_BYTES >> 20} are read")
        buffer = bytearray(size)
        read_exactly(descriptor, path, 0, memoryview(buffer))
    return parse_json(bytes(buffer), str(path))


def parse_json(data: bytes, origin: str) -> dict[str, Any]:
    """A JSON object; duplicate keys are an error."""
    try:
        found = json.loads(data, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ModelFileError(f"{origin}: not usable as JSON: {what[:120]}") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{origin}: a JSON object expected, it is {type(found).__name__}")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for (key, count) in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _refuse_constant(name: str) -> Any:
    """NaN and infinities, which some configurations hold in unused settings."""
    return None
