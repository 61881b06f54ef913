"""Reads files of torch.save: ZIP archives with a pickle, and with uncompressed tensor data that is read in place."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from llamaclust.core.errors import ModelFileError
from llamaclust.model.checkpoints.source_file import SourceFile
from llamaclust.model.checkpoints.storage import MAX_DIMENSIONS
from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.formats.safe_pickle import TensorRef, read_pickle
from llamaclust.tools.convert.formats.source_files import lazy_tensor
from llamaclust.tools.convert.lazy import Lazy, Recent, transposed

_ZIP: Final = b"PK\x03\x04"
_MAX_PICKLE_BYTES: Final = 1 << 28
_MAX_DIRECTORY_BYTES: Final = 1 << 26
_LOCAL_HEADER_BYTES: Final = 30
_WRAPPERS: Final = ("state_dict", "model", "module")


@dataclass(frozen=True, slots=True)
class _Member:
    offset: int
    n_bytes: int


def read_torch(file: SourceFile, recent: Recent) -> dict[str, Lazy]:
    members = _members(file)
    pickled = next((name for name in members if name.endswith("/data.pkl") or name == "data.pkl"), None)
    if pickled is None:
        raise file.error("the zip file has no data.pkl: torch.save did not write it")
    place = members[pickled]
    if place.n_bytes > _MAX_PICKLE_BYTES:
        raise file.error(f"data.pkl has {place.n_bytes >> 20} MiB; the limit is {_MAX_PICKLE_BYTES >> 20} MiB")
    root = pickled.removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order is not None and file.read(order.offset, min(order.n_bytes, 16)) != b"little":
        raise file.error("the numbers are not little-endian")
    found = read_pickle(file.read(place.offset, place.n_bytes), f"{file.path}: data.pkl")
    storages = {name.removeprefix(f"{root}data/"): member for name, member in members.items()}
    return {name: _tensor(file, name, ref, storages, recent) for name, ref in _named_tensors(found, file).items()}


def _named_tensors(found: Any, file: SourceFile) -> dict[str, TensorRef]:
    for _ in range(2):
        inner = [found[name] for name in _WRAPPERS if isinstance(found, dict) and isinstance(found.get(name), dict)]
        if not inner:
            break
        found = inner[0]
    if not isinstance(found, dict):
        raise file.error(f"expected names and tensors, found {type(found).__name__}")
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, TensorRef)}
    if not tensors:
        raise file.error("the file has no tensor with a name")
    return tensors


def _tensor(file: SourceFile, name: str, ref: TensorRef, members: dict[str, _Member], recent: Recent) -> Lazy:
    origin = f"{file.path}: tensor {shown(name)}"
    member = members.get(ref.storage.key)
    if member is None:
        raise ModelFileError(f"{origin}: the numbers in data/{shown(ref.storage.key)[1:-1]} are missing")
    count, storage = _count(ref, origin), ref.storage.storage
    item = storage.dtype.itemsize
    if ref.storage.count * item > member.n_bytes or ref.offset + count > ref.storage.count:
        needed = max(ref.storage.count, ref.offset + count) * item
        raise ModelFileError(f"{origin}: expected {needed} bytes in the archive member, found {member.n_bytes}")
    start = member.offset + ref.offset * item
    shape = ref.shape or (1,)
    if ref.stride == _contiguous(ref.shape):
        return lazy_tensor(file, name, start, shape, storage)
    if len(shape) == 2 and ref.stride == (1, shape[0]):
        return transposed(lazy_tensor(file, name, start, shape[::-1], storage), recent)
    raise ModelFileError(f"{origin}: strides {list(ref.stride)} for shape {list(shape)} are not supported")


def _count(ref: TensorRef, origin: str) -> int:
    few = len(ref.stride) == len(ref.shape) <= MAX_DIMENSIONS
    if not few or min((*ref.shape, 1)) < 1 or prod(ref.shape) >= 1 << 48:
        raise ModelFileError(
            f"{origin}: shape {list(ref.shape)[:8]} with strides {list(ref.stride)[:8]} is not supported"
        )
    return prod(ref.shape)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[place + 1 :]) for place in range(len(shape)))


def _members(file: SourceFile) -> dict[str, _Member]:
    if file.read(0, min(4, file.size_bytes)) != _ZIP:
        raise file.error("not a zip file; save it again with PyTorch 1.6 or newer, which writes zip files")
    try:
        with zipfile.ZipFile(_Window(file)) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
        raise file.error(f"the zip file is damaged or was cut short: {error}") from None
    members: dict[str, _Member] = {}
    for entry in listed:
        place = f"member {shown(entry.filename)}"
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise file.error(f"{place} is compressed or encrypted, which is not supported: torch.save did not write it")
        if entry.file_size != entry.compress_size or entry.header_offset + entry.file_size > file.size_bytes:
            raise file.error(f"{place} claims {entry.file_size} bytes, but the file has {file.size_bytes}")
        if entry.filename in members:
            raise file.error(f"{place} occurs twice")
        members[entry.filename] = _Member(_data_offset(file, entry), entry.file_size)
    _check_apart(file, members)
    return members


def _data_offset(file: SourceFile, entry: zipfile.ZipInfo) -> int:
    local = file.read(entry.header_offset, _LOCAL_HEADER_BYTES)
    if local[:4] != _ZIP:
        raise file.error(f"member {shown(entry.filename)}: its header is not where the archive's list of members says")
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return entry.header_offset + _LOCAL_HEADER_BYTES + lengths


def _check_apart(file: SourceFile, members: dict[str, _Member]) -> None:
    """Raises ModelFileError if members overlap, since a small file could then claim any number of large tensors."""
    at = 0
    for name, member in sorted(members.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        if member.offset < at:
            raise file.error(f"member {shown(name)} begins inside another member")
        at = member.offset + member.n_bytes
    if at > file.size_bytes:
        raise file.error(f"members end at byte {at}, but the file ends at {file.size_bytes}: it was cut short")


class _Window(io.RawIOBase):
    """The file object through which `zipfile` reads the list of members. A single read is limited to 64 MiB."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size_bytes}[whence] + offset
        if at < 0:
            raise ValueError("seek before the start of the file")
        self._at = at
        return at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._file.size_bytes - self._at)
        count = left if count < 0 else min(count, left)
        if count > _MAX_DIRECTORY_BYTES:
            limit = f"the limit is {_MAX_DIRECTORY_BYTES >> 20} MiB"
            raise ValueError(f"the list of the archive's members has {count >> 20} MiB; {limit}")
        data = self._file.read(self._at, count)
        self._at += count
        return data
