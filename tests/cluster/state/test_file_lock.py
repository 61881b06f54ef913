"""Tests of locks on file systems that fail: no descriptor is left behind, and a later attempt succeeds."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from llamaclust.cluster.state import file_lock
from llamaclust.cluster.state.file_lock import FileLock
from support.descriptors import open_files


@pytest.mark.parametrize("take", [FileLock.take, FileLock.take_next])
def test_a_file_system_without_locks_leaves_no_descriptor_open(
    take: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> bool:
        raise OSError(errno.ENOLCK, "no locks")

    assert callable(take)
    monkeypatch.setattr(file_lock, "take_lock", refuse)
    lock = FileLock(tmp_path / "lock")
    before = open_files()
    for _ in range(5):
        with pytest.raises(OSError, match="no locks"):
            take(lock)
        assert open_files() <= before


def test_a_lock_is_taken_after_its_file_could_not_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*given: object) -> bool:
        monkeypatch.undo()
        raise OSError(errno.ESTALE, "stale")

    lock, other = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert other.take() and not lock.take_next()
    other.release()
    monkeypatch.setattr(file_lock, "_is_at", stale)
    with pytest.raises(OSError, match="stale"):
        lock.take_next()
    assert lock.take_next() and lock.is_held
    lock.release()
