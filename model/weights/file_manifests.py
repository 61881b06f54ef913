"""Manifests of model files. Each version of a file gets one manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.weights.cache import WeightCache
from llamaclust.model.weights.manifest import MANIFEST_VERSION, make_manifest

_log = logging.getLogger(__name__)

_SETTLED_NS = 100_000_000
"""The minimum age of a file's last change when it is read, so that a later change gets another timestamp."""


@dataclass(frozen=True, slots=True)
class FileManifest:
    """The size of a manifest, and its SHA-256 in hex (`content`), which also identifies the model's bytes."""

    content: str
    n_bytes: int


class FileManifests:
    """The manifests of model files. Without a cache, each process computes them, and keeps only their digests."""

    def __init__(self, cache: WeightCache | None = None) -> None:
        self.cache = cache
        self._known: dict[str, FileManifest] = {}  # The keys are versions of files.

    def of(
        self,
        file: ModelFile,
        begin: Callable[[int], None] = lambda total: None,
        add: Callable[[int], None] = lambda n: None,
    ) -> FileManifest:
        """Returns a file's manifest. If the manifest is unknown, reads the whole file. `begin` gets the total size, and
        `add` gets each piece's size (on several threads). Raises ModelFileError if the file changes meanwhile."""
        version = file.version
        known = self._known.get(version)
        # The cache may have been cleared, or may have needed the room.
        if known is None or (self.cache is not None and self.cache.find(known.content) is None):
            known = self._known[version] = self._made(file, begin, add)
        return known

    def _made(self, file: ModelFile, begin: Callable[[int], None], add: Callable[[int], None]) -> FileManifest:
        _settle(file)
        if self.cache is None:
            return _manifest_of(_read(file, begin, add))
        self.cache.prepare()
        key = sha256(f"{file.version}, manifest {MANIFEST_VERSION}".encode()).hexdigest()
        with self.cache.making(key):
            content = self.cache.known_manifest(key)
            if content is None:
                content = self.cache.keep_manifest(key, _read(file, begin, add))
        return FileManifest(content, self.cache.place(content).stat().st_size)


def _read(file: ModelFile, begin: Callable[[int], None], add: Callable[[int], None]) -> bytes:
    _log.info("reading %s for the SHA-256 of each tensor", file.path)
    begin(sum(tensor.n_bytes for tensor in file.tensors.values()))
    return make_manifest(file, add)


def _manifest_of(data: bytes) -> FileManifest:
    return FileManifest(sha256(data).hexdigest(), len(data))


def _settle(file: ModelFile) -> None:
    age_ns = time.time_ns() - file.changed_ns
    if 0 <= age_ns < _SETTLED_NS:
        time.sleep((_SETTLED_NS - age_ns) / 1e9)
