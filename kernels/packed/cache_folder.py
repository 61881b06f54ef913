"""The folder of the packed-weight cache. Entries are named by their key, and images by the SHA-256 of their bytes."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any

from llamaclust.core.disk_cache.cache import CachedFile, DiskCache
from llamaclust.core.disk_cache.files import Writing, remove

_ENTRY, _IMAGE = ".json", ".tiles"

_MOST_ENTRY_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Entry:
    key: str  # Must equal the file's name. A moved or copied entry is invalid.
    model: str
    layer: str
    image: str  # SHA-256 of the image's bytes, in hexadecimal.
    n_bytes: int
    checksum: int


_FIELDS = {field.name: int if field.type == "int" else str for field in fields(Entry)}


def _decoded(data: bytes, key: str) -> Entry | None:
    try:
        found: Any = json.loads(data)
        is_sound = {name: type(value) for name, value in found.items()} == _FIELDS
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    if not is_sound or found["key"] != key or not re.fullmatch("[0-9a-f]{64}", found["image"]):
        return None
    return Entry(**found)


@dataclass(frozen=True, slots=True)
class Listed:
    model: str
    parts: int  # Number of layers, plus embedding and output.
    size_bytes: int
    used_ns: int


class PackedCacheFolder(DiskCache):
    """The files of the cache: entries, and images with the packed bytes. An entry is deleted before its image."""

    suffixes = (_ENTRY, _IMAGE)
    content, limit = "packed layers", "LLAMACLUST_CACHE_SIZE"

    def image_path(self, entry: Entry) -> Path:
        return self.path / f"{entry.image}{_IMAGE}"

    def find(self, key: str) -> Entry | None:
        """Returns the entry if its image has the right size. Marks both files as used. Raises OSError like `open`."""
        name = _entry_name(key)
        if (data := self.read(name, _MOST_ENTRY_BYTES)) is None:
            return None
        if (entry := _decoded(data, key)) is None:
            self.drop(name, "it is not an entry of a packed layer")
            return None
        if (image := self.open_image(entry)) is None:
            remove(self.path / name)
            return None
        image.close()
        return entry

    def open_image(self, entry: Entry) -> FileIO | None:
        file = self.open(self.image_path(entry).name)
        if file is None or os.fstat(file.fileno()).st_size == entry.n_bytes:
            return file
        file.close()
        self.discard(entry)
        return None

    def discard(self, entry: Entry) -> None:
        remove(self.path / _entry_name(entry.key))
        remove(self.image_path(entry))

    def store(self, entry: Entry, data: memoryview, since_ns: int, writing: Writing) -> None:
        self.write(self.image_path(entry).name, [data], since_ns=since_ns, writing=writing)
        self.write(_entry_name(entry.key), [json.dumps(asdict(entry)).encode()], since_ns=since_ns, writing=writing)

    def list_models(self) -> list[Listed]:
        images = {file.path.stem: file for file in self.files(_IMAGE)}
        models: dict[str, dict[str, CachedFile]] = {}
        for file in self.files(_ENTRY):
            with suppress(OSError):
                data = self.read(file.path.name, _MOST_ENTRY_BYTES, is_use=False)
                entry = None if data is None else _decoded(data, file.path.stem)
                if entry is not None and entry.image in images:
                    models.setdefault(entry.model, {})[entry.image] = images[entry.image]
        return [
            Listed(
                model, len(of), sum(file.size_bytes for file in of.values()), max(file.used_ns for file in of.values())
            )
            for model, of in sorted(models.items())
        ]


def _entry_name(key: str) -> str:
    return f"{key}{_ENTRY}"
