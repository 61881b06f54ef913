"""Compiled kernels on disk, shared by all processes of a user."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import get_ident

from llamaclust.kernels.cuda.runtime.nvrtc import Nvrtc, machine_target
from llamaclust.kernels.cuda.runtime.sources import OPTIONS

_KINDS = ("cubin", "ptx")
_UNUSED_S = 90 * 86400.0
_UNFINISHED_S = 3600.0


class CubinCache:
    """Compiled modules by the hash of source, options, architecture and compiler. If `folder` cannot be written, or
    other users can write there, modules are kept in a temporary folder until `close`."""

    def __init__(self, folder: Path | None) -> None:
        """None: no persistent folder."""
        self._folder = folder
        self._instead: TemporaryDirectory[str] | None = None

    def close(self) -> None:
        if self._instead is not None:
            self._instead.cleanup()

    def get(self, nvrtc: Nvrtc, name: str, text: str, architecture: int, *, anew: bool = False) -> Path:
        """The file of a module; compiled if it is missing or if `anew`."""
        of = "\0".join((text, *OPTIONS, machine_target(architecture), str(nvrtc.version)))
        stem = f"{name}-{hashlib.sha256(of.encode()).hexdigest()[:32]}"
        folder = self._folder if self._folder is not None and _is_safe(self._folder) else None
        if folder is not None and not anew:
            for path in (folder / f"{stem}.{kind}" for kind in _KINDS):
                if path.is_file():
                    with suppress(OSError):  # of another user
                        os.utime(path)
                    return path
        binary = nvrtc.compile(name, text, architecture)
        file = f"{stem}.{binary.kind}"
        if folder is not None:
            with suppress(OSError):
                _evict_unused(folder)
                return _write(folder / file, binary.data)
        self._instead = self._instead or TemporaryDirectory(prefix="llamaclust-kernels-")
        return _write(Path(self._instead.name) / file, binary.data)


def _is_safe(folder: Path) -> bool:
    """Creates the folder if needed. Whether it is readable, and only this user may write there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return False
    is_own = found.st_uid in (0, os.geteuid()) and not stat.S_IMODE(found.st_mode) & 0o022
    return is_own and os.access(folder, os.R_OK | os.X_OK)


def kernel_files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Compiled and unfinished files. OSError."""
    found = []
    for pattern in (*(f"*.{kind}" for kind in _KINDS), "*.tmp"):
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):  # another process cleans up
                found.append((path, path.lstat()))
    return found


def _evict_unused(folder: Path) -> None:
    """Deletes kernels that were unused for long, and unfinished files of killed processes."""
    now_s = time.time()
    for path, found in kernel_files(folder):
        if now_s - found.st_mtime > (_UNFINISHED_S if path.suffix == ".tmp" else _UNUSED_S):
            path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> Path:
    """Atomic."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{get_ident()}.tmp")
    try:
        partial.write_bytes(data)
        return partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
