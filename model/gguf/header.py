"""The header of one GGUF file (version 2 or 3, little-endian): metadata and the places of tensors, all checked."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.gguf.cursor import HeaderCursor
from llamaclust.model.gguf.tensors import FileIdentity, Tensor, open_regular, read_exactly
from llamaclust.model.gguf.values import MetadataValue, fail_at, kind_of, shown
from llamaclust.model.quant_types import QuantType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
STRING_TYPE, ARRAY_TYPE, BOOL_TYPE = 8, 9, 7
NUMBER_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 1 << 48
_MAX_KEY_BYTES = (1 << 16) - 1
_MAX_TENSOR_NAME_BYTES = 255
_MAX_TEXT_BYTES = 1 << 24
_MAX_ALIGNMENT = 1 << 20
_MAX_NESTED_ARRAYS = 1 << 14
_MAX_NESTING = 4
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_SAMPLES, _SAMPLE_BYTES = 16, 4096

_SCALARS = {number: Struct(code) for number, code in NUMBER_FORMATS.items()}


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says. `digest` is SHA-256 over the header, the file's size and a few samples of the weights."""

    path: Path
    file_identity: FileIdentity
    metadata: dict[str, MetadataValue]
    tensors: dict[str, Tensor]
    digest: bytes


@dataclass(frozen=True, slots=True)
class _TensorEntry:
    name: str
    quant_type: QuantType
    shape: tuple[int, ...]
    offset: int  # from the start of the data section

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.quant_type.info.row_bytes(self.shape[-1])


def read_header(path: Path) -> Header:
    """Reads and checks one file's header. Any fault is a ModelFileError that names the file and the place."""
    with open_regular(path) as descriptor:
        identity = FileIdentity.of(descriptor)
        cursor = HeaderCursor(descriptor, path, identity.size_bytes)
        key_count, tensor_count = _read_start(cursor)
        metadata = _read_metadata(cursor, key_count)
        entries = _read_entries(cursor, tensor_count)
        data_start = _aligned(cursor.position, _alignment(path, metadata))
        tensors = {entry.name: _place(entry, path, data_start, identity) for entry in entries}
        _check_overlaps(path, tensors)
        digest = _digest(cursor, descriptor, path, data_start)
        if FileIdentity.of(descriptor) != identity:
            raise fail_at(path, "header", "the file changed while it was read", "try again when it is complete")
    return Header(path, identity, metadata, tensors, digest)


def raw_metadata(path: Path) -> dict[str, bytes]:
    """Every key's type and value as they stand in the file, for a copy that keeps them. Errors as for `read_header`."""
    with open_regular(path) as descriptor:
        cursor = HeaderCursor(descriptor, path, FileIdentity.of(descriptor).size_bytes)
        key_count, _ = _read_start(cursor)
        return dict(_read_raw(cursor) for _ in range(key_count))


def _read_raw(cursor: HeaderCursor) -> tuple[str, bytes]:
    key = cursor.string(_MAX_KEY_BYTES)
    start = cursor.position
    _ValueReader(cursor).read(key)
    with cursor.consumed as consumed:
        return key, bytes(consumed[start:])


def _read_start(cursor: HeaderCursor) -> tuple[int, int]:
    if cursor.remaining_bytes < 24 or cursor.take(4) != MAGIC:
        raise cursor.error("not a GGUF file", "give the path of a .gguf file")
    version = cursor.u32()
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS)
        what = "a big-endian file" if big_endian else f"GGUF version {version}"
        raise cursor.error(f"{what} is not supported", "convert it to little-endian GGUF version 3")
    tensor_count, key_count = cursor.u64(), cursor.u64()
    if tensor_count > min(MAX_TENSORS, cursor.remaining_bytes // _MIN_TENSOR_BYTES):
        raise cursor.error(f"{tensor_count} tensors in a file with {cursor.remaining_bytes} bytes left")
    if key_count > min(MAX_KEYS, cursor.remaining_bytes // _MIN_KEY_BYTES):
        raise cursor.error(f"{key_count} metadata keys in a file with {cursor.remaining_bytes} bytes left")
    return key_count, tensor_count


def _read_metadata(cursor: HeaderCursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    values = _ValueReader(cursor)
    for number in range(count):
        cursor.place = f"metadata key {number}"
        key = cursor.string(_MAX_KEY_BYTES)
        cursor.place = f"metadata {shown(key)}"
        if not key or key in metadata:
            raise cursor.error("the key stands twice in the file" if key else "an empty key")
        metadata[key] = values.read(key)
    return metadata


class _ValueReader:
    """Reads values; counts arrays inside arrays, which a hostile file could nest or repeat without end."""

    __slots__ = ("_cursor", "_nested")

    def __init__(self, cursor: HeaderCursor) -> None:
        self._cursor = cursor
        self._nested = 0

    def read(self, key: str) -> MetadataValue:
        value_type = self._cursor.u32()
        return self._array(key, 1) if value_type == ARRAY_TYPE else self._scalar(value_type)

    def _scalar(self, value_type: int) -> MetadataValue:
        cursor = self._cursor
        if value_type == STRING_TYPE:
            return cursor.string(_MAX_TEXT_BYTES)
        if value_type == BOOL_TYPE:
            byte = cursor.take(1)[0]
            if byte > 1:
                raise cursor.error(f"a truth value of {byte}")
            return byte == 1
        scalar = _SCALARS.get(value_type)
        if scalar is None:
            raise cursor.error(f"unknown value type {value_type}")
        value: int | float = scalar.unpack(cursor.take(scalar.size))[0]
        return value

    def _array(self, key: str, depth: int) -> MetadataValue:
        cursor = self._cursor
        item_type, count = cursor.u32(), cursor.u64()
        if item_type == STRING_TYPE:
            return cursor.strings(count, key)
        if item_type == ARRAY_TYPE:
            self._nested += count
            if depth == _MAX_NESTING or self._nested > _MAX_NESTED_ARRAYS:
                raise cursor.error(f"arrays nested {depth + 1} deep, {self._nested} in all", "the file is not usable")
            return tuple(self._array(key, depth + 1) for _ in range(count))
        return self._numbers(item_type, count)

    def _numbers(self, item_type: int, count: int) -> NDArray[Any]:
        cursor = self._cursor
        code = "u1" if item_type == BOOL_TYPE else NUMBER_FORMATS.get(item_type)
        if code is None:
            raise cursor.error(f"unknown array type {item_type}")
        dtype = np.dtype(code)
        if count > cursor.remaining_bytes // dtype.itemsize:
            raise cursor.error(f"an array of {count} numbers in a file with {cursor.remaining_bytes} bytes left")
        values = np.frombuffer(cursor.take(count * dtype.itemsize), dtype)
        if item_type != BOOL_TYPE:
            return values
        if count and values.max() > 1:
            raise cursor.error(f"a truth value of {values.max()}")
        return values.view(np.bool_)


def _read_entries(cursor: HeaderCursor, count: int) -> list[_TensorEntry]:
    entries: list[_TensorEntry] = []
    names: set[str] = set()
    for number in range(count):
        cursor.place = f"tensor {number}"
        name = cursor.string(_MAX_TENSOR_NAME_BYTES)
        cursor.place = f"tensor {shown(name)}"
        if not name or name in names:
            raise cursor.error("the name stands twice in the file" if name else "an empty name")
        names.add(name)
        entries.append(_read_entry(cursor, name))
    return entries


def _read_entry(cursor: HeaderCursor, name: str) -> _TensorEntry:
    dimensions = cursor.u32()
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.error(f"{dimensions} dimensions, 1 to {MAX_DIMENSIONS} allowed")
    sizes = [cursor.u64() for _ in range(dimensions)]
    if 0 in sizes or math.prod(sizes) > MAX_ELEMENTS:
        raise cursor.error(f"a shape of {sizes}")
    quant_type = _quant_type(cursor, cursor.u32())
    block_size = quant_type.info.block_size
    if sizes[0] % block_size:
        raise cursor.error(f"rows of {sizes[0]} weights, {quant_type.name} needs a multiple of {block_size}")
    return _TensorEntry(name, quant_type, tuple(reversed(sizes)), cursor.u64())


def _quant_type(cursor: HeaderCursor, number: int) -> QuantType:
    try:
        return QuantType(number)
    except ValueError:
        raise cursor.error(f"unknown quant type {number}", "quantize the model to a type such as Q4_K") from None


def _alignment(path: Path, metadata: dict[str, MetadataValue]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    place = "metadata 'general.alignment'"
    if not isinstance(value, int) or isinstance(value, bool):
        raise fail_at(path, place, f"{kind_of(value)}, a whole number expected")
    if not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise fail_at(path, place, f"{value}, a power of two up to {_MAX_ALIGNMENT} expected")
    return value


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _place(entry: _TensorEntry, path: Path, data_start: int, identity: FileIdentity) -> Tensor:
    offset = data_start + entry.offset
    end = offset + entry.n_bytes
    if end > identity.size_bytes:
        what = f"ends at byte {end}, the file at byte {identity.size_bytes}"
        raise fail_at(path, f"tensor {shown(entry.name)}", what, "the file is incomplete, download it again")
    return Tensor(entry.name, entry.quant_type, entry.shape, path, offset, entry.n_bytes, identity)


def _check_overlaps(path: Path, tensors: dict[str, Tensor]) -> None:
    ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.n_bytes > after.offset:
            raise fail_at(path, f"tensor {shown(after.name)}", f"overlaps tensor {shown(before.name)}")


def _digest(cursor: HeaderCursor, descriptor: int, path: Path, data_start: int) -> bytes:
    """SHA-256 of header, size and samples: two fine-tunes of one base model must not pass for the same model."""
    size_bytes = cursor.position + cursor.remaining_bytes
    hashed = hashlib.sha256(size_bytes.to_bytes(8, "little"))
    with cursor.consumed as header:
        hashed.update(header)
    last = size_bytes - _SAMPLE_BYTES
    if last >= data_start:
        for number in range(_SAMPLES):
            sample = bytearray(_SAMPLE_BYTES)
            offset = data_start + (last - data_start) * number // (_SAMPLES - 1)
            read_exactly(descriptor, path, offset, memoryview(sample))
            hashed.update(sample)
    return hashed.digest()
