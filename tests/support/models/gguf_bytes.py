"""Writes GGUF files byte by byte, with any field wrong."""

from __future__ import annotations

from struct import pack

UINT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 2, 4, 5, 6, 7, 8, 9
F32, F16, Q4_0 = 0, 1, 2


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return pack("<Q", len(data)) + data


def key(name: str | bytes, value_type: int, value: bytes) -> bytes:
    return text(name) + pack("<I", value_type) + value


def number(name: str, value: int) -> bytes:
    return key(name, UINT32, pack("<I", value))


def array(name: str, item_type: int, count: int, items: bytes) -> bytes:
    return key(name, ARRAY, pack("<IQ", item_type, count) + items)


def tensor(name: str | bytes, sizes: list[int], quant_type: int = F32, offset: int = 0) -> bytes:
    """Returns a tensor info; `sizes` are in the file's order, the row length first."""
    return (
        text(name) + pack("<I", len(sizes)) + b"".join(pack("<Q", s) for s in sizes) + pack("<IQ", quant_type, offset)
    )


def gguf(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Returns a whole file; missing counts are those of the lists."""
    keys, tensors = keys or [], tensors or []
    key_count = len(keys) if key_count is None else key_count
    tensor_count = len(tensors) if tensor_count is None else tensor_count
    header = magic + pack("<IQQ", version, tensor_count, key_count) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data
