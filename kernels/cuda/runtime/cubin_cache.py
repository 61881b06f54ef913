"""Compiled kernels on disk, shared by all processes of one user."""

from __future__ import annotations

import logging
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from llamaclust.core.disk_cache.cache import DiskCache
from llamaclust.core.disk_cache.files import reason
from llamaclust.kernels.cuda.runtime.nvrtc import Binary, Nvrtc, machine_target
from llamaclust.kernels.cuda.runtime.sources import OPTIONS

_log = logging.getLogger(__name__)

_MOST_BYTES = 1 << 30
"""The maximum size of the folder, for all versions, architectures and compilers. One set of kernels takes 1 % of it."""

_MOST_MODULE_BYTES = 1 << 28


class KernelFolder(DiskCache):
    """The folder of compiled modules. A file's name has digests of the module's sources and of the file's bytes."""

    suffixes = (".cubin", ".ptx")
    content, limit = "compiled kernels", "of all versions"

    def __init__(self, path: Path) -> None:
        super().__init__(path, _MOST_BYTES)

    def find(self, key: str) -> Path | None:
        for path in (path for suffix in self.suffixes for path in self.path.glob(f"{key}.*{suffix}")):
            data = self.read(path.name, _MOST_MODULE_BYTES)
            if data is not None and path.name == _file_name(key, data, path.suffix):
                return path
            if data is not None:
                self.drop(path.name, "its bytes differ from those that were compiled")
        return None

    def keep(self, key: str, binary: Binary) -> Path:
        name = _file_name(key, binary.data, f".{binary.kind}")
        self.write(name, [binary.data])
        return self.path / name


class CubinCache:
    """Finds compiled modules by a hash of source, options, architecture and compiler version. If a module cannot be
    stored in `folder`, it is stored in a temporary folder until `close`."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else KernelFolder(folder)
        self._instead: TemporaryDirectory[str] | None = None
        self._is_reported = False  # True after a warning that the folder cannot be used.

    def close(self) -> None:
        if self._instead is not None:
            self._instead.cleanup()

    def get(self, nvrtc: Nvrtc, name: str, text: str, architecture: int, *, anew: bool = False) -> Path:
        of = "\0".join((text, *OPTIONS, machine_target(architecture), str(nvrtc.version)))
        key = f"{name}-{_digest(of.encode())}"
        found = None if anew else self._in_folder(lambda folder: folder.find(key))
        if found is not None:
            return found
        binary = nvrtc.compile(name, text, architecture)
        return self._in_folder(lambda folder: folder.keep(key, binary)) or self._keep_for_now(key, binary)

    def _in_folder(self, act: Callable[[KernelFolder], Path | None]) -> Path | None:
        if self._folder is None:
            return None
        try:
            self._folder.create()
            return act(self._folder)
        except OSError as error:
            if not self._is_reported:
                _log.warning("compiled kernels cannot be stored: %s; the next start compiles them again", reason(error))
            self._is_reported = True
            return None

    def _keep_for_now(self, key: str, binary: Binary) -> Path:
        self._instead = self._instead or TemporaryDirectory(prefix="llamaclust-kernels-")
        path = Path(self._instead.name) / _file_name(key, binary.data, f".{binary.kind}")
        path.write_bytes(binary.data)
        return path


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()[:32]


def _file_name(key: str, data: bytes, suffix: str) -> str:
    return f"{key}.{_digest(data)}{suffix}"
