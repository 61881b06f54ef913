"""safetensors files: header length, JSON header, data."""

from __future__ import annotations

from math import prod
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.formats.source_files import SourceFile, parse_json
from llamaclust.tools.convert.lazy import MAX_DIMENSIONS, Lazy, Storage

_MAX_HEADER_BYTES: Final = 100_000_000
_METADATA: Final = "__metadata__"
_AS_BYTES: Final = {"F8_E4M3": Storage.U8}
"""8-bit floats, which need the scales in other tensors."""


def read_safetensors(file: SourceFile) -> dict[str, Lazy]:
    """All tensors of one file by name. ModelFileError for one that is damaged or has a type that is not known."""
    length = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, file.size_bytes - 8):
        raise file.error(
            f"a header of {length} bytes in a file of {file.size_bytes}: no safetensors file, or cut short"
        )
    header = parse_json(file.read(8, length), f"{file.path}: header")
    entries = {name: _entry(file, name, said) for name, said in header.items() if name != _METADATA}
    _check_places(file, 8 + length, entries)
    return {
        name: file.tensor(name, 8 + length + start, shape, storage)
        for name, (storage, shape, start, _) in entries.items()
    }


_Entry = tuple[Storage, tuple[int, ...], int, int]


def _entry(file: SourceFile, name: str, said: Any) -> _Entry:
    try:
        kind, shape, (start, end) = said["dtype"], tuple(said["shape"]), said["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _bad(file, name, "its entry in the header is not complete") from None
    known = {**Storage.__members__, **_AS_BYTES}
    if not isinstance(kind, str) or kind not in known:
        raise _bad(file, name, f"type {shown(str(kind))} is not known; known: {', '.join(known)}")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, start, end)):
        raise _bad(file, name, "shape or place are not whole numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise _bad(file, name, f"{len(shape)} dimensions, {MAX_DIMENSIONS} at most are known")
    storage = known[kind]
    shape = shape or (1,)
    if end - start != prod(shape) * storage.dtype.itemsize:
        raise _bad(file, name, f"{end - start} bytes for shape {list(shape)} of {kind}")
    return storage, shape, start, end


def _check_places(file: SourceFile, first: int, entries: dict[str, _Entry]) -> None:
    """Checks that the tensors are contiguous and end with the file."""
    at = 0
    for name, (_, _, start, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != at:
            raise _bad(file, name, f"begins at byte {start} of the data, {at} expected")
        at = end
    if first + at != file.size_bytes:
        raise file.error(f"{file.size_bytes} bytes, {first + at} expected: it was cut short, or is damaged")


def _bad(file: SourceFile, name: str, what: str) -> ModelFileError:
    return ModelFileError(f"{file.path}: tensor {shown(name)}: {what}")
