"""Tests of the size limits of each kind of disk cache, and of full and read-only disks."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from llamaclust.core.disk_cache.cache import DiskCache, NoRoomError
from support.disk_caches import BYTES, ROOM, Make, data, main_file, there, unfinished


def test_the_longest_unused_make_room(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    user = make(room=3)
    for number in range(3):
        user.put(number)
    assert user.get(0) is not None  # The file was used last.
    user.put(3)
    assert there(user, range(4)) == [0, 2, 3]
    user.put(4)
    assert there(user, range(5)) == [0, 3, 4] or there(user, range(5)) == [2, 3, 4]
    assert user.cache.used_bytes <= user.cache.most_bytes
    assert caplog.text == ""


def test_a_file_larger_than_the_bound_is_refused(make: Make) -> None:
    user = make(room=1)
    with pytest.raises(OSError):
        user.put(1, 2 * BYTES)
    assert user.cache.files() == [] and unfinished(user) == []
    with pytest.raises(NoRoomError, match=r"1 MiB more of .* do not fit: 0 MiB are in use, and the limit is 1 MiB \("):
        user.cache.write(f"x{user.suffix}", [bytes(2 * BYTES)])


def test_files_that_are_needed_make_no_room(make: Make) -> None:
    user, begun_ns = make(room=2), time.time_ns()
    user.put(1)
    kept = main_file(user).name
    name = f"new{user.suffix}"
    for options in ({"since_ns": begun_ns}, {"kept": {file.path.name for file in user.cache.files()}}):
        with pytest.raises(NoRoomError):
            user.cache.write(name, [bytes(2 * BYTES)], **options)
    assert (user.cache.path / kept).exists()
    user.cache.write(name, [bytes(2 * BYTES)], since_ns=time.time_ns())
    assert not (user.cache.path / kept).exists()


def test_a_file_that_cannot_fit_deletes_no_other(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    user = make(room=3)
    user.put(1)
    user.put(2)
    with pytest.raises(NoRoomError, match="the limit is"):
        user.cache.write(f"x{user.suffix}", [bytes(5 * BYTES)])
    with monkeypatch.context() as patch:
        disk(patch, 20 * BYTES, 0)
        with pytest.raises(NoRoomError, match="the disk has 0 MiB free"):
            user.cache.write(f"x{user.suffix}", [bytes(3 * BYTES)])
    assert there(user, range(3)) == [1, 2]


def test_the_number_of_files_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    user = make()
    monkeypatch.setattr(type(user.cache), "most_files", 4)
    for number in range(8):
        user.put(number)
    assert len(user.cache.files()) <= 4 and user.get(7) == data(7)


def disk(patch: pytest.MonkeyPatch, total: int, free: int) -> None:
    given = os.statvfs("/")
    sizes = {"f_frsize": 1, "f_blocks": total, "f_bavail": free}
    fields = [name for name in dir(given) if name.startswith("f_")]
    found = type("Statvfs", (), {name: sizes.get(name, getattr(given, name)) for name in fields})
    patch.setattr(os, "statvfs", lambda path: found)


def test_a_part_of_the_disk_stays_free(make: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    user = make()
    if kind == "packed":  # Tests may put packed layers on any disk.
        monkeypatch.setattr(type(user.cache), "free_bytes", DiskCache.free_bytes)
    user.put(1)
    # This is enough for one more file, but not if a twentieth of the disk must stay free.
    free = BYTES + 5000
    disk(monkeypatch, 20 * BYTES, free)
    user.put(2)
    assert there(user, range(3)) == ([1, 2] if kind == "weights" else [2])
    disk(monkeypatch, 20 * BYTES, 100)
    stays = "" if kind == "weights" else r" \(1 must stay free\)"
    with pytest.raises(
        NoRoomError, match=rf"the disk has 0 MiB free{stays}, but 1 MiB more of .*; make room there, or set"
    ):
        user.cache.write(f"x{user.suffix}", [bytes(4 * BYTES)])
    disk(monkeypatch, 1 << 50, (2 << 30) + 10 * BYTES)
    user.put(3)
    assert user.get(3) == data(3)


def test_a_full_disk_loses_nothing_but_the_copy(
    make: Make, small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other programs fill the disk after the cache has checked its free space."""
    user = make(path=small_disk / "cache")
    user.put(1)
    with monkeypatch.context() as patch:
        disk(patch, ROOM, ROOM // 2)
        with pytest.raises(OSError):
            user.put(2, 2 << 20)
    assert unfinished(user) == [] and there(make(path=small_disk / "cache"), range(3)) == [1]
    assert user.get(2, 2 << 20) is None
    user.put(3)
    assert there(user, range(4)) == [1, 3]


def test_a_read_only_file_system_is_read(make: Make, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A container whose image has compiled kernels may have a read-only file system."""
    user = make(path=small_disk / "cache")
    user.put(1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    again = make(path=small_disk / "cache")
    assert (again.get(1), again.get(2)) == (data(1), None) and caplog.text == ""
    with pytest.raises(OSError, match=r"Read-only|not saved"):
        again.put(2)
