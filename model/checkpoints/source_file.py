"""An open checkpoint file that is read with pread."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.tensors import read_exactly


@dataclass(frozen=True, slots=True)
class SourceFile:
    path: Path
    descriptor: int
    size_bytes: int

    def read(self, offset: int, count: int) -> bytes:
        if offset < 0 or count < 0 or offset + count > self.size_bytes:
            raise self.error(
                f"expected {count} bytes at byte {offset}, but the file has {self.size_bytes}: it was cut short"
            )
        buffer = bytearray(count)
        read_exactly(self.descriptor, self.path, offset, memoryview(buffer))
        return bytes(buffer)

    def error(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}")
