from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llamaclust.core.errors import UsageError
from llamaclust.wire.security.token import ClusterToken
from llamaclust.worker.groups.listener import SOCKET_ENDING

_MAX_SOCKET_BYTES = 107
_PREFIX = "llamaclust-"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory with the sockets of a local cluster. It has mode 0700, and is removed when the cluster ends."""

    path: Path
    token: ClusterToken

    @property
    def coordinator(self) -> str:
        return f"unix:{self.path / 'c.sock'}"

    def worker(self, index: int) -> str:
        return f"unix:{self.path / f'w{index}.sock'}"


@contextmanager
def run_directory(parent: Path) -> Iterator[RunDirectory]:
    """Creates a run directory in `parent`, or in the temporary directory if socket paths would be too long. The caller
    must hold the lock on `parent`. Raises UsageError if a file has the directory's name."""
    path = place = parent / "run"
    _clear(place)
    if os.path.lexists(place):
        raise UsageError(f"{place} is in the way of the folder for sockets; remove it")
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if len(os.fsencode(place / f"w1000.sock{SOCKET_ENDING}")) > _MAX_SOCKET_BYTES:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        place.symlink_to(path)
    else:
        path.mkdir(mode=0o700)
    try:
        yield RunDirectory(path, ClusterToken.create())
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _clear(place)


def _clear(place: Path) -> None:
    if not place.is_symlink():
        if place.is_dir():  # Only folders are removed, because opening a pipe would block.
            shutil.rmtree(place, ignore_errors=True)
        return
    target = place.readlink()
    if target.is_dir() and target.parent == Path(tempfile.gettempdir()) and target.name.startswith(_PREFIX):
        shutil.rmtree(target, ignore_errors=True)
    place.unlink()
