"""Fields of protobuf messages as bytes, for what is encoded without protobuf's objects."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

_ONE_BYTE = tuple(bytes((value,)) for value in range(0x80))


def varint(value: int) -> bytes:
    """An unsigned number."""
    if value < 0x80:
        return _ONE_BYTE[value]
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    groups = [value >> shift & 0x7F | 0x80 for shift in range(0, value.bit_length(), 7)]
    groups[-1] &= 0x7F
    return bytes(groups)


def sized(data: bytes) -> bytes:
    """A string, message or packed list behind its field's tag."""
    return varint(len(data)) + data


def packed(numbers: Iterable[int]) -> bytes:
    """A list of unsigned numbers behind its field's tag."""
    return sized(b"".join(map(varint, numbers)))


def packed_words(numbers: Sequence[int]) -> bytes:
    """A list of fixed32 behind its field's tag."""
    return sized(struct.pack(f"<{len(numbers)}I", *numbers))
