"""Compiled kernels on disk, for all processes of a user."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import get_ident

from llamaclust.kernels.cuda.runtime.nvrtc import Nvrtc
from llamaclust.kernels.cuda.runtime.sources import OPTIONS

_KINDS = ("cubin", "ptx")
_UNUSED_S = 90 * 86400.0
_UNFINISHED_S = 3600.0


class CubinCache:
    """Compiled modules on disk, each by the hash of all that it depends on. What `folder` does not take, or
    where others could plant theirs, is kept until `close`."""

    def __init__(self, folder: Path | None) -> None:
        """None: nothing stays."""
        self._folder = folder
        self._instead: TemporaryDirectory[str] | None = None

    def close(self) -> None:
        if self._instead is not None:
            self._instead.cleanup()

    def get(self, nvrtc: Nvrtc, name: str, text: str, architecture: int, *, anew: bool = False) -> Path:
        """A file to load, compiled now if it is not there, or is to be made `anew`."""
        of = "\0".join((text, *OPTIONS, str(architecture), str(nvrtc.version)))
        stem = f"{name}-{hashlib.sha256(of.encode()).hexdigest()[:32]}"
        folder = self._folder if self._folder is not None and _is_safe(self._folder) else None
        if folder is not None and not anew:
            for path in (folder / f"{stem}.{kind}" for kind in _KINDS):
                if path.is_file():
                    _used_now(path)
                    return path
        binary = nvrtc.compile(name, text, architecture)
        file = f"{stem}.{binary.kind}"
        if folder is not None:
            with suppress(OSError):
                _forget_unused(folder)
                return _write(folder / file, binary.data)
        self._instead = self._instead or TemporaryDirectory(prefix="llamaclust-kernels-")
        return _write(Path(self._instead.name) / file, binary.data)


def _is_safe(folder: Path) -> bool:
    """Whether it can be read, and nobody else writes there; it is made where it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return False
    is_own = found.st_uid in (0, os.geteuid()) and not stat.S_IMODE(found.st_mode) & 0o022
    return is_own and os.access(folder, os.R_OK | os.X_OK)


def kernel_files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """What is kept there, and what was left unfinished. OSError."""
    found = []
    for pattern in (*(f"*.{kind}" for kind in _KINDS), "*.tmp"):
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):  # another process cleans up
                found.append((path, path.lstat()))
    return found


def _used_now(path: Path) -> None:
    with suppress(OSError):  # of another user
        os.utime(path)


def _forget_unused(folder: Path) -> None:
    """Kernels of earlier versions and cards that are gone, and what processes that were killed left unfinished."""
    now_s = time.time()
    for path, found in kernel_files(folder):
        if now_s - found.st_mtime > (_UNFINISHED_S if path.suffix == ".tmp" else _UNUSED_S):
            path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> Path:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{get_ident()}.tmp")
    try:
        partial.write_bytes(data)
        return partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
