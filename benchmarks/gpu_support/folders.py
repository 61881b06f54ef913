"""Checks that a run can use its folder for results, before any long step begins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamaclust.cluster.state.file_lock import FileLock
from llamaclust.core.errors import UsageError

LOCK = ".lock"


def ready_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # Modes do not show this for root or for a read-only medium.
            pass
    except (FileExistsError, NotADirectoryError):
        what = "a link to nothing" if folder.is_symlink() and not folder.exists() else "not a folder"
        raise UsageError(f"{folder}: {what}") from None
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to: {error.strerror}") from None


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Holds the folder's lock until the context or the process ends. Raises UsageError if another run holds it."""
    lock = FileLock(folder / LOCK)
    if not lock.take():
        raise UsageError(f"another run uses {folder}")
    try:
        yield
    finally:
        lock.release()
