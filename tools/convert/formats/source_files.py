"""Files of a checkpoint. Each file is opened once, read with pread, and checked for changes at the end."""

from __future__ import annotations

from contextlib import ExitStack
from math import prod
from pathlib import Path

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.source_file import SourceFile
from llamaclust.model.checkpoints.storage import MAX_DIMENSIONS, Storage
from llamaclust.model.gguf.tensors import FileIdentity, open_regular, read_exactly
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.lazy import Array, Lazy, Recent


class SourceFiles:
    """Open files of a checkpoint. They are closed when the `with` block ends. `recent` caches whole tensors."""

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
        for file, identity in self._open.values():
            if FileIdentity.of(file.descriptor) != identity:
                raise file.error("the file changed while it was read; try again when it is complete")


def lazy_tensor(file: SourceFile, name: str, offset: int, shape: tuple[int, ...], storage: Storage) -> Lazy:
    origin = f"{file.path}: tensor {shown(name)}"
    if not 0 < len(shape) <= MAX_DIMENSIONS or min(shape) < 1:
        raise ModelFileError(
            f"{origin}: expected 1 to {MAX_DIMENSIONS} dimensions, none of them 0, found {list(shape)}"
        )
    row_bytes = prod(shape[1:]) * storage.dtype.itemsize
    if offset < 0 or offset + shape[0] * row_bytes > file.size_bytes:
        end = offset + shape[0] * row_bytes
        raise ModelFileError(f"{origin} ends at byte {end}, but the file ends at {file.size_bytes}: it was cut short")

    def read(start: int, end: int) -> Array:
        values = np.empty((end - start, *shape[1:]), storage.dtype)
        if values.size:
            view = values.data.cast("B")
            read_exactly(file.descriptor, file.path, offset + start * row_bytes, view)
        return values

    return Lazy(shape, storage, read, origin)
