"""A GGUF model in one or several files. Has typed getters for metadata, and tensors that are read later."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from llamaclust.core.errors import ModelFileError
from llamaclust.core.this_machine import machine_id
from llamaclust.model.gguf.file_systems import is_remote
from llamaclust.model.gguf.header import DEFAULT_ALIGNMENT, MAGIC, Header, read_header
from llamaclust.model.gguf.tensors import FileIdentity, Tensor, open_regular, read_exactly
from llamaclust.model.gguf.values import LazyStrings, MetadataValue, fail_at, kind_of, shown

PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model in one file, or in several parts of which `path` is the first. `identity` is the model id: a SHA-256 in
    hex over headers, sizes and samples of the weights."""

    path: Path
    parts: tuple[Path, ...]
    size_bytes: int
    identity: str
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, Tensor]

    @property
    def is_current(self) -> bool:
        try:
            there = {path: FileIdentity.from_status(path.stat()) for path, _ in self._files}
        except OSError:
            return False
        return all((there[path], there[path].changed_ns) == (was, was.changed_ns) for path, was in self._files)

    @property
    def version(self) -> str:
        """A hash of the model's contents and its files' inodes, sizes and times. It changes when a file is
        rewritten."""
        files = sorted((found.inode, found.size_bytes, found.modified_ns, found.changed_ns) for _, found in self._files)
        return hashlib.sha256(repr((self.identity, files)).encode()).hexdigest()

    @property
    def copy_id(self) -> str:
        """A hash that identifies a copy of the files. On a local file system, it includes this machine's id."""
        machine = "" if is_remote(self.path) else machine_id()
        return hashlib.sha256(f"{self.version} {machine}".encode()).hexdigest()

    @property
    def changed_ns(self) -> int:
        return max((max(found.modified_ns, found.changed_ns) for _, found in self._files), default=0)

    @property
    def _files(self) -> set[tuple[Path, FileIdentity]]:
        return {(tensor.path, tensor.file_identity) for tensor in self.tensors.values()}

    def error(self, key: str, what: str, advice: str = "use another GGUF file of this model") -> ModelFileError:
        return fail_at(self.path, f"metadata {shown(key)}", what, advice)

    def tensor(self, name: str) -> Tensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise fail_at(self.path, f"tensor {shown(name)}", "missing", "use another GGUF file of this model")
        return tensor

    def metadata_int(
        self, key: str, default: int | None = None, *, minimum: int = 0, maximum: int = (1 << 31) - 1
    ) -> int:
        """Returns a whole number, or `default` if the key is missing. Raises ModelFileError if both are missing."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"expected a whole number, found {kind_of(value)}")
        if not minimum <= value <= maximum:
            raise self.error(key, f"expected {minimum} to {maximum}, found {value}")
        return value

    def metadata_float(
        self, key: str, default: float | None = None, *, minimum: float = -math.inf, maximum: float = math.inf
    ) -> float:
        value = self._value(key, default)
        if not isinstance(value, float):
            raise self.error(key, f"expected a decimal number, found {kind_of(value)}")
        if not math.isfinite(value) or not minimum <= value <= maximum:
            raise self.error(key, f"expected {minimum:g} to {maximum:g}, found {value:g}")
        return value

    def metadata_str(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"expected text, found {kind_of(value)}")
        return value

    def metadata_strings(self, key: str) -> Sequence[str]:
        value = self._value(key, None)
        if not isinstance(value, LazyStrings):
            raise self.error(key, f"expected an array of text, found {kind_of(value)}")
        return value

    def _value(self, key: str, default: MetadataValue | None) -> MetadataValue:
        value = self.metadata.get(key, default)
        if value is None:
            raise self.error(key, "missing")
        return value


def open_model(path: Path | str) -> ModelFile:
    """Reads the header of a GGUF file, and of all parts if `path` is the first part of a split model. Raises
    ModelFileError, which names the file and the place, if anything is missing, damaged, hostile or not supported."""
    first = read_header(Path(path))
    headers = [first, *_other_parts(first)]
    tensors: dict[str, Tensor] = {}
    for header in headers:
        repeated = next((name for name in header.tensors if name in tensors), None)
        if repeated is not None:
            what = f"it is also in {tensors[repeated].path.name}"
            raise fail_at(header.path, f"tensor {shown(repeated)}", what, "get all parts of the same model")
        tensors.update(header.tensors)
    if len(headers) > 1:
        _check_tensor_count(first, len(tensors))
    return ModelFile(
        path=first.path,
        parts=tuple(header.path for header in headers),
        size_bytes=sum(header.file_identity.size_bytes for header in headers),
        identity=hashlib.sha256(b"".join(header.digest for header in headers)).hexdigest(),
        metadata=MappingProxyType(first.metadata),
        tensors=MappingProxyType(tensors),
    )


def _other_parts(first: Header) -> list[Header]:
    count = _split_number(first, "split.count", default=1, minimum=0)
    name = PART_NAME.fullmatch(first.path.name)
    if count <= 1:  # llama-gguf-split writes a count of 0 when it merges parts.
        if name and int(name["count"]) > 1:
            stated = f"the file says {count}" if "split.count" in first.metadata else "the key is missing"
            raise fail_at(
                first.path, "split.count", f"{stated}, but the file's name says {name['count']} parts", _RENAME
            )
        return []
    _check_alone(first, count)
    if not name or int(name["count"]) != count:
        wanted = f"-00001-of-{count:05}.gguf"
        raise fail_at(
            first.path, "split.count", f"this is one of {count} parts, but its name does not end in {wanted}", _RENAME
        )
    number = _split_number(first, "split.no", default=None, minimum=0)
    if number != 0 or int(name["number"]) != 1:
        start = f"{name['stem']}-00001-of-{count:05}.gguf"
        raise fail_at(
            first.path, "split.no", f"this is part {number + 1} of {count}", f"give the first part, {shown(start)}"
        )
    seen = {first.file_identity: first.path}
    return [
        _part(first, f"{name['stem']}-{part + 1:05}-of-{count:05}.gguf", part, count, seen) for part in range(1, count)
    ]


def _check_alone(part: Header, count: int) -> None:
    """Raises ModelFileError if the file contains several parts, which happens if parts were joined with `cat`."""
    end = max((tensor.offset + tensor.n_bytes for tensor in part.tensors.values()), default=0)
    size_bytes = part.file_identity.size_bytes
    follows = bytearray(min(size_bytes - end, DEFAULT_ALIGNMENT + len(MAGIC)))
    with open_regular(part.path) as descriptor:
        read_exactly(descriptor, part.path, end, memoryview(follows))
    if end and MAGIC in follows:
        what = f"one of {count} parts ends at byte {end} and another follows it: the parts were joined"
        advice = (
            "get the parts as they were published and give the first; `llamaclust model merge` makes one file of them"
        )
        raise fail_at(part.path, "split model", what, advice)


_RENAME = "give the file back the name it was published with"
_GET_PART = "get the missing part of the same model"


def _part(first: Header, name: str, number: int, count: int, seen: dict[FileIdentity, Path]) -> Header:
    path = first.path.with_name(name)
    try:
        header = read_header(path)
    except ModelFileError as error:
        raise ModelFileError(f"{error} (part {number + 1} of {count} of {first.path.name})") from error
    identity = header.file_identity
    if identity in seen:
        raise fail_at(path, "split model", f"the part is the same file as {seen[identity].name}", _GET_PART)
    seen[identity] = path
    stated = _split_number(header, "split.no", default=None, minimum=0)
    if stated != number:
        raise fail_at(path, "split.no", f"expected {number} in part {number + 1}, found {stated}", _RENAME)
    stated = _split_number(header, "split.count", default=None, minimum=1)
    if stated != count:
        raise fail_at(path, "split.count", f"this part says {stated}, but {first.path.name} says {count}", _GET_PART)
    return header


def _check_tensor_count(first: Header, found: int) -> None:
    stated = _split_number(first, "split.tensors.count", default=None, minimum=0)
    if stated != found:
        raise fail_at(
            first.path,
            "split.tensors.count",
            f"the first part says {stated} tensors, but the parts have {found}",
            _GET_PART,
        )


def _split_number(header: Header, key: str, *, default: int | None, minimum: int) -> int:
    value = header.metadata.get(key, default)
    if value is None:
        raise fail_at(header.path, key, "missing", _GET_PART)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise fail_at(header.path, key, f"expected a whole number of {minimum} or more, found {kind_of(value)}")
    return value
