"""Reads the header of a safetensors file, which has the length of the header, the header as JSON, and the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.json_file import parse_json
from llamaclust.model.checkpoints.source_file import SourceFile
from llamaclust.model.checkpoints.storage import MAX_DIMENSIONS, Storage
from llamaclust.model.gguf.values import shown

_MAX_HEADER_BYTES: Final = 100_000_000
_METADATA: Final = "__metadata__"
_AS_BYTES: Final = {"F8_E4M3": Storage.U8}
"""8-bit float types that are read as bytes. Their scales are in other tensors."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    storage: Storage
    shape: tuple[int, ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.storage.dtype.itemsize


def read_safetensors(file: SourceFile) -> list[StoredTensor]:
    length = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, file.size_bytes - 8):
        raise file.error(
            f"the header has {length} bytes, and the file has {file.size_bytes}: not a safetensors file, or cut short"
        )
    header = parse_json(file.read(8, length), f"{file.path}: header")
    tensors = [_stored(file, name, entry, 8 + length) for name, entry in header.items() if name != _METADATA]
    _check_places(file, 8 + length, tensors)
    return tensors


def _stored(file: SourceFile, name: str, entry: Any, first: int) -> StoredTensor:
    try:
        kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _bad(file, name, "the tensor's entry in the header is not complete") from None
    known = {**Storage.__members__, **_AS_BYTES}
    if not isinstance(kind, str) or kind not in known:
        raise _bad(file, name, f"type {shown(str(kind))} is not supported; supported are {', '.join(known)}")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, start, end)):
        raise _bad(file, name, "the tensor's shape and data_offsets must be whole numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise _bad(file, name, f"the tensor has {len(shape)} dimensions; the limit is {MAX_DIMENSIONS}")
    tensor = StoredTensor(name, known[kind], shape or (1,), first + start)
    if end - start != tensor.n_bytes:
        raise _bad(
            file, name, f"needs {tensor.n_bytes} bytes for shape {list(tensor.shape)} of {kind}, found {end - start}"
        )
    return tensor


def _check_places(file: SourceFile, first: int, tensors: Iterable[StoredTensor]) -> None:
    at = first
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.n_bytes)):
        if tensor.offset != at:
            raise _bad(
                file, tensor.name, f"expected at byte {at - first} of the data, found at {tensor.offset - first}"
            )
        at += tensor.n_bytes
    if at != file.size_bytes:
        raise file.error(f"expected {at} bytes, found {file.size_bytes}: the file was cut short, or is damaged")


def _bad(file: SourceFile, name: str, what: str) -> ModelFileError:
    return ModelFileError(f"{file.path}: tensor {shown(name)}: {what}")
