"""Where processes of a local cluster meet: sockets and the token, in a directory that only their user may enter."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llamaclust.wire.token import ClusterToken

_MAX_SOCKET_BYTES = 107
"""What fits in a socket address (Linux)."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """`path` has mode 0700 and goes away with the cluster."""

    path: Path
    token: ClusterToken

    @property
    def token_file(self) -> Path:
        return self.path / "token"

    @property
    def coordinator(self) -> str:
        """gRPC target of the coordinator."""
        return f"unix:{self.path / 'c.sock'}"

    def worker(self, index: int) -> str:
        """gRPC target of a worker's Stage service."""
        return f"unix:{self.path / f'w{index}.sock'}"


@contextmanager
def run_directory(parent: Path) -> Iterator[RunDirectory]:
    """A new run directory in `parent`, or in the machine's temporary directory where paths would be too long.

    What a cluster that was killed has left in `parent` is removed: the caller holds the lock on it.
    """
    path = parent / "run"
    if len(os.fsencode(path / "w1000.sock")) > _MAX_SOCKET_BYTES:
        path = Path(tempfile.mkdtemp(prefix="llamaclust-"))
    else:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700, parents=True)
    try:
        yield RunDirectory(path, ClusterToken.create(path / "token"))
    finally:
        shutil.rmtree(path, ignore_errors=True)
