"""Writes GGUF version 3 files tensor by tensor, so that a model may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import pack
from typing import Any, BinaryIO, Self

import numpy as np

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.atomic_file import new_file, new_files
from llamaclust.model.gguf.header import ARRAY_TYPE, BOOL_TYPE, DEFAULT_ALIGNMENT, MAGIC, NUMBER_FORMATS, STRING_TYPE
from llamaclust.model.gguf.values import MetadataValue, padded, shown
from llamaclust.model.quant_types import QuantType

_VERSION = 3
_NUMBER_TYPES = {np.dtype(code): number for number, code in NUMBER_FORMATS.items()} | {np.dtype(np.bool_): BOOL_TYPE}


@dataclass(frozen=True, slots=True)
class RawValue:
    data: bytes


WritableValue = MetadataValue | np.generic | Sequence[str] | RawValue
"""A metadata value. A Python int becomes uint32 if it fits, otherwise int32 or a 64-bit type. A float becomes float32.
NumPy values keep their type. Sequences of text become arrays of strings, and other sequences arrays of arrays."""

Bytes = bytes | bytearray | memoryview
Produce = Callable[[], Bytes | Iterator[Bytes]]


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor to write. `produce` is called once, when the tensor is written, and must return exactly `n_bytes` bytes.
    `shape` is row-major, slowest dimension first. The last dimension must be a multiple of the type's block size."""

    name: str
    quant_type: QuantType
    shape: tuple[int, ...]
    produce: Produce

    @property
    def n_bytes(self) -> int:
        return self.quant_type.tensor_bytes(self.shape)


@dataclass(frozen=True, slots=True)
class Contents:
    header: bytes
    tensors: tuple[TensorSource, ...]
    alignment: int

    @classmethod
    def of(cls, metadata: Mapping[str, WritableValue], tensors: Iterable[TensorSource]) -> Self:
        alignment, sources = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT)), tuple(tensors)  # type: ignore[arg-type]
        return cls(header_bytes(metadata, sources, alignment), sources, alignment)

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(padded(tensor.n_bytes, self.alignment) for tensor in self.tensors)

    def write(self, file: BinaryIO) -> None:
        file.write(self.header)
        for tensor in self.tensors:
            _write_tensor(file, tensor, self.alignment)


def write_gguf(path: Path | str, metadata: Mapping[str, WritableValue], tensors: Iterable[TensorSource]) -> None:
    """Writes a GGUF file, which is named `path` only when complete. Raises UsageError if disk space is short."""
    contents = Contents.of(metadata, tensors)
    with new_file(Path(path), contents.n_bytes) as file:
        contents.write(file)


def write_gguf_parts(parts: Mapping[Path, Contents]) -> None:
    with new_files(list(parts), sum(contents.n_bytes for contents in parts.values())) as opened:
        for path, contents in parts.items():
            with opened(path) as file:
                contents.write(file)


def header_bytes(
    metadata: Mapping[str, WritableValue], sources: Sequence[TensorSource] = (), alignment: int = DEFAULT_ALIGNMENT
) -> bytes:
    header = bytearray(MAGIC + pack("<IQQ", _VERSION, len(sources), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _value(value)
    offset = 0
    for source in sources:
        header += _text(source.name) + pack("<I", len(source.shape))
        header += b"".join(pack("<Q", size) for size in reversed(source.shape))
        header += pack("<IQ", source.quant_type, offset)
        offset += padded(source.n_bytes, alignment)
    return bytes(header.ljust(padded(len(header), alignment), b"\0"))


def _text(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise ModelFileError(f"{shown(text)} cannot be written: it contains half of a UTF-16 surrogate pair") from None
    return pack("<Q", len(data)) + data


def _value(value: WritableValue) -> bytes:
    if isinstance(value, RawValue):
        return value.data
    if isinstance(value, str):
        return pack("<I", STRING_TYPE) + _text(value)
    if isinstance(value, bool | int | float | np.generic):
        scalar = value if isinstance(value, np.generic) else _scalar(value)
        return pack("<I", _NUMBER_TYPES[scalar.dtype]) + scalar.tobytes()
    if isinstance(value, np.ndarray):
        return pack("<IIQ", ARRAY_TYPE, _NUMBER_TYPES[value.dtype], value.size) + value.tobytes()
    if all(isinstance(item, str) for item in value):
        return pack("<IIQ", ARRAY_TYPE, STRING_TYPE, len(value)) + b"".join(_text(str(item)) for item in value)
    arrays = b"".join(_value(item).removeprefix(pack("<I", ARRAY_TYPE)) for item in value)
    return pack("<IIQ", ARRAY_TYPE, ARRAY_TYPE, len(value)) + arrays


def _scalar(value: bool | int | float) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    kinds: tuple[type[np.integer[Any]], ...] = (np.uint32, np.int32, np.uint64, np.int64)
    fitting = next(kind for kind in kinds if np.iinfo(kind).min <= value <= np.iinfo(kind).max)
    return fitting(value)


def _write_tensor(file: BinaryIO, source: TensorSource, alignment: int) -> None:
    made, written = source.produce(), 0
    for piece in (made,) if isinstance(made, bytes | bytearray | memoryview) else made:
        written += file.write(memoryview(piece).cast("B"))
    assert written == source.n_bytes, f"{source.name}: {written} bytes made, {source.n_bytes} announced"
    file.write(bytes(padded(written, alignment) - written))
