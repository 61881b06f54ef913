"""Reads and checks the header of a GGUF file (version 2 or 3, little-endian): metadata and positions of tensors."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.other_files import START_BYTES, other_kind
from llamaclust.model.gguf.tensors import FileIdentity, Tensor, open_regular, read_exactly
from llamaclust.model.gguf.values import LENGTH, LazyStrings, MetadataValue, fail_at, kind_of, padded, shown
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
_FIRST_CHUNK_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 26  # The largest vocabularies need a quarter of it.
_MAX_STRINGS = 1 << 22

_SCALARS = {number: Struct(code) for number, code in NUMBER_FORMATS.items()}


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a GGUF file. `digest` is a SHA-256 over the header, the file's size and samples of the weights."""

    path: Path
    file_identity: FileIdentity
    metadata: dict[str, MetadataValue]
    tensors: dict[str, Tensor]
    digest: bytes


class _Cursor:
    """A position in the header of a file. The header is read from front to back in growing chunks. Lengths are checked
    against the file's size before they are used. Errors name `place`, the part of the header that is being read."""

    __slots__ = ("_buffer", "_descriptor", "_nested", "_path", "_size_bytes", "place", "position")

    def __init__(self, descriptor: int, path: Path, size_bytes: int) -> None:
        self._descriptor = descriptor
        self._path = path
        self._size_bytes = size_bytes
        self._buffer = bytearray()
        self.place = "header"
        self.position = 0
        self._nested = 0  # Number of arrays inside arrays, limited because a hostile file may have any number.

    @property
    def consumed(self) -> memoryview:
        return memoryview(self._buffer)[: self.position]

    @property
    def remaining_bytes(self) -> int:
        return self._size_bytes - self.position

    def error(self, what: str, advice: str = "the file is damaged, download it again") -> ModelFileError:
        return fail_at(self._path, f"{self.place} (byte {self.position})", what, advice)

    def need(self, count: int) -> None:
        end = self.position + count
        if end <= len(self._buffer):
            return
        if end > self._size_bytes:
            raise self.error(f"{count} more bytes are needed, but the file ends at byte {self._size_bytes}")
        if end > _MAX_HEADER_BYTES:
            raise self.error(f"the header is longer than {_MAX_HEADER_BYTES >> 20} MiB")
        have = len(self._buffer)
        wanted = min(self._size_bytes, _MAX_HEADER_BYTES, max(end, 2 * have, _FIRST_CHUNK_BYTES))
        chunk = bytearray(wanted - have)
        read_exactly(self._descriptor, self._path, have, memoryview(chunk))
        self._buffer += chunk

    def take(self, count: int) -> bytes:
        self.need(count)
        start = self.position
        self.position = start + count
        return bytes(memoryview(self._buffer)[start : self.position])

    def peek(self, count: int) -> bytes:
        count = min(count, self.remaining_bytes)
        self.need(count)
        return bytes(self._buffer[self.position : self.position + count])

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def _string_bytes(self, max_bytes: int) -> bytes:
        length = self.u64()
        if length > max_bytes:
            raise self.error(f"a string has {length} bytes; the limit is {max_bytes}")
        return self.take(length)

    def text(self, max_bytes: int) -> str:
        """Reads a text with its length in front. Invalid UTF-8, such as in an author's name, becomes U+FFFD."""
        return str(self._string_bytes(max_bytes), "utf-8", "replace")

    def string(self, max_bytes: int) -> str:
        data = self._string_bytes(max_bytes)
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a string is not UTF-8 ({error.reason})") from error

    def strings(self, count: int, key: str) -> LazyStrings:
        if count > min(_MAX_STRINGS, self.remaining_bytes // 8):
            raise self.error(f"an array of {count} strings exceeds the limit or does not fit in the file")
        start = self.position
        self._skip_strings(count)
        return LazyStrings(bytes(memoryview(self._buffer)[start : self.position]), count, f"{self._path}: {shown(key)}")

    def _skip_strings(self, count: int) -> None:
        buffer, unpack = self._buffer, LENGTH.unpack_from
        at, ready = self.position, len(buffer)
        for _ in range(count):
            if at + 8 > ready:
                self.need(at + 8 - self.position)
                ready = len(buffer)
            at += 8 + unpack(buffer, at)[0]
        self.need(at - self.position)
        self.position = at

    def value(self, key: str) -> MetadataValue:
        value_type = self.u32()
        return self._array(key, 1) if value_type == ARRAY_TYPE else self._scalar(value_type)

    def _scalar(self, value_type: int) -> MetadataValue:
        if value_type == STRING_TYPE:
            return self.text(_MAX_TEXT_BYTES)
        if value_type == BOOL_TYPE:
            byte = self.take(1)[0]
            if byte > 1:
                raise self.error(f"a Boolean must be 0 or 1, not {byte}")
            return byte == 1
        scalar = _SCALARS.get(value_type)
        if scalar is None:
            raise self.error(f"unknown value type {value_type}")
        value: int | float = scalar.unpack(self.take(scalar.size))[0]
        return value

    def _array(self, key: str, depth: int) -> MetadataValue:
        item_type, count = self.u32(), self.u64()
        if item_type == STRING_TYPE:
            return self.strings(count, key)
        if item_type == ARRAY_TYPE:
            self._nested += count
            if depth == _MAX_NESTING or self._nested > _MAX_NESTED_ARRAYS:
                limits = f"the limits are {_MAX_NESTED_ARRAYS} arrays and {_MAX_NESTING} levels"
                what = f"{self._nested} nested arrays, {depth + 1} levels deep; {limits}"
                raise self.error(what, "use another GGUF file of this model")
            return tuple(self._array(key, depth + 1) for _ in range(count))
        return self._numbers(item_type, count)

    def _numbers(self, item_type: int, count: int) -> NDArray[Any]:
        code = "u1" if item_type == BOOL_TYPE else NUMBER_FORMATS.get(item_type)
        if code is None:
            raise self.error(f"unknown array type {item_type}")
        dtype = np.dtype(code)
        if count > self.remaining_bytes // dtype.itemsize:
            raise self.error(f"{count} numbers do not fit in the remaining {self.remaining_bytes} bytes of the file")
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if item_type != BOOL_TYPE:
            return values
        if count and values.max() > 1:
            raise self.error(f"a Boolean must be 0 or 1, not {values.max()}")
        return values.view(np.bool_)


def read_header(path: Path) -> Header:
    with open_regular(path) as descriptor:
        identity = FileIdentity.of(descriptor)
        cursor = _Cursor(descriptor, path, identity.size_bytes)
        key_count, tensor_count = _read_start(cursor)
        metadata = _read_metadata(cursor, key_count)
        found = _read_tensors(cursor, tensor_count, path, identity)
        data_start = padded(cursor.position, _alignment(path, metadata))
        tensors = {name: _placed(tensor, data_start) for name, tensor in found.items()}
        _check_overlaps(path, tensors)
        digest = _digest(cursor, descriptor, path, data_start)
        if FileIdentity.of(descriptor) != identity:
            raise fail_at(path, "header", "the file changed while it was read", "try again when it is complete")
    return Header(path, identity, metadata, tensors, digest)


def raw_metadata(path: Path) -> dict[str, bytes]:
    """Returns each metadata key's raw type and value for exact copies. Raises ModelFileError if the file is invalid."""
    with open_regular(path) as descriptor:
        cursor = _Cursor(descriptor, path, FileIdentity.of(descriptor).size_bytes)
        values = {}
        for _ in range(_read_start(cursor)[0]):
            key = cursor.string(_MAX_KEY_BYTES)
            start = cursor.position
            cursor.value(key)
            with cursor.consumed as consumed:
                values[key] = bytes(consumed[start:])
        return values


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    start = cursor.peek(START_BYTES)
    if not start.startswith(MAGIC):
        what, advice = other_kind(start)
        raise cursor.error(f"not a GGUF file: {what}", advice)
    cursor.take(len(MAGIC))
    version = cursor.u32()
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS)
        what = "a big-endian file" if big_endian else f"GGUF version {version}"
        raise cursor.error(f"{what} is not supported", "convert it to little-endian GGUF version 3")
    tensor_count, key_count = cursor.u64(), cursor.u64()
    if tensor_count > min(MAX_TENSORS, cursor.remaining_bytes // _MIN_TENSOR_BYTES):
        raise cursor.error(
            f"{tensor_count} tensors do not fit in the remaining {cursor.remaining_bytes} bytes of the file"
        )
    if key_count > min(MAX_KEYS, cursor.remaining_bytes // _MIN_KEY_BYTES):
        raise cursor.error(
            f"{key_count} metadata keys do not fit in the remaining {cursor.remaining_bytes} bytes of the file"
        )
    return key_count, tensor_count


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for number in range(count):
        cursor.place = f"metadata key {number}"
        key = cursor.string(_MAX_KEY_BYTES)
        cursor.place = f"metadata {shown(key)}"
        if not key or key in metadata:
            raise cursor.error("the key occurs twice in the file" if key else "the key is empty")
        metadata[key] = cursor.value(key)
    return metadata


def _read_tensors(cursor: _Cursor, count: int, path: Path, identity: FileIdentity) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number in range(count):
        cursor.place = f"tensor {number}"
        name = cursor.string(_MAX_TENSOR_NAME_BYTES)
        cursor.place = f"tensor {shown(name)}"
        if not name or name in tensors:
            raise cursor.error("the name occurs twice in the file" if name else "the name is empty")
        quant_type, shape = _read_shape(cursor)
        offset = cursor.u64()
        tensors[name] = Tensor(name, quant_type, shape, path, offset, quant_type.tensor_bytes(shape), identity)
    return tensors


def _read_shape(cursor: _Cursor) -> tuple[QuantType, tuple[int, ...]]:
    dimensions = cursor.u32()
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.error(f"expected 1 to {MAX_DIMENSIONS} dimensions, found {dimensions}")
    sizes = [cursor.u64() for _ in range(dimensions)]
    if 0 in sizes or math.prod(sizes) > MAX_ELEMENTS:
        raise cursor.error(f"shape {sizes} contains 0, or has more than {MAX_ELEMENTS} elements")
    quant_type = _quant_type(cursor, cursor.u32())
    block_size = quant_type.info.block_size
    if sizes[0] % block_size:
        raise cursor.error(f"rows have {sizes[0]} weights, but {quant_type.name} needs a multiple of {block_size}")
    return quant_type, tuple(reversed(sizes))


def _quant_type(cursor: _Cursor, number: int) -> QuantType:
    try:
        return QuantType(number)
    except ValueError:
        raise cursor.error(f"unknown quant type {number}", "quantize the model to a type such as Q4_K") from None


def _alignment(path: Path, metadata: dict[str, MetadataValue]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    place = "metadata 'general.alignment'"
    if not isinstance(value, int) or isinstance(value, bool):
        raise fail_at(path, place, f"expected a whole number, found {kind_of(value)}")
    if not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise fail_at(path, place, f"expected a power of two up to {_MAX_ALIGNMENT}, found {value}")
    return value


def _placed(tensor: Tensor, data_start: int) -> Tensor:
    offset, size_bytes = data_start + tensor.offset, tensor.file_identity.size_bytes
    if offset + tensor.n_bytes > size_bytes:
        what = f"it ends at byte {offset + tensor.n_bytes}, but the file ends at byte {size_bytes}"
        raise fail_at(tensor.path, f"tensor {shown(tensor.name)}", what, "the file is incomplete, download it again")
    return replace(tensor, offset=offset)


def _check_overlaps(path: Path, tensors: dict[str, Tensor]) -> None:
    ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.n_bytes > after.offset:
            raise fail_at(path, f"tensor {shown(after.name)}", f"it overlaps tensor {shown(before.name)}")


def _digest(cursor: _Cursor, descriptor: int, path: Path, data_start: int) -> bytes:
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
