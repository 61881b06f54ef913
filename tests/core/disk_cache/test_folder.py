"""Tests of the disk cache's folder: permissions, foreign files and damaged files, for each kind of cache."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from llamaclust.core.disk_cache.cache import Cleared
from support.disk_caches import BYTES, ROOM, USERS, Make, data, main_file, there


def test_what_was_put_is_found_by_another_process(make: Make) -> None:
    user = make()
    user.put(1)
    assert (make().get(1), make().get(2)) == (data(1), None)
    assert stat.S_IMODE(user.cache.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in user.cache.path.iterdir()} == {0o600}
    before = {path: path.stat().st_ino for path in user.cache.path.iterdir()}
    make().put(1)
    assert {path: path.stat().st_ino for path in user.cache.path.iterdir()} == before, "written again"


def as_another_user(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)


def as_link(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def as_file(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.rename(path.with_name("elsewhere"))
    path.touch()


def for_writing(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.chmod(0o770)


REFUSED = {
    "another user": (as_another_user, r"belongs to another user \(id \d+\)"),
    "link": (as_link, "is a symbolic link; set LLAMACLUST_HOME to use another disk"),
    "file": (as_file, "Not a directory"),
    "writable": (for_writing, r"other users may (write to|enter) the folder \(mode 770\)"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_a_folder_that_is_not_of_this_user_alone_is_refused_with_one_line(
    make: Make, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    user = make()
    spoil, words = REFUSED[way]
    spoil(user.cache.path, monkeypatch)
    with pytest.raises(OSError, match=words) as caught:
        user.cache.create()
    assert caught.value.filename == str(user.cache.path)
    if way != "writable":  # Files that others may have planted there can be deleted.
        with pytest.raises(OSError, match=words):
            user.cache.clear()


def test_only_secret_files_are_refused_where_others_may_read(make: Make, kind: str) -> None:
    user = make()
    user.cache.path.chmod(0o755)
    if kind == "kv":
        with pytest.raises(PermissionError, match=r"other users may enter the folder \(mode 755\)"):
            user.cache.create()
    else:
        user.cache.create()


def of_another_user(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    shutil.copy2(path.parent.parent / "elsewhere", path)
    os.chown(path, 4711, 4711)


THINGS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path),
    "dangling": lambda path: path.symlink_to("nothing"),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to the file": lambda path: path.symlink_to(path.parent.parent / "elsewhere"),
    "of another user": of_another_user,
}


@pytest.mark.parametrize("thing", THINGS)
def test_what_is_no_file_of_this_user_is_replaced(make: Make, caplog: pytest.LogCaptureFixture, thing: str) -> None:
    user = make()
    user.put(1)
    path = main_file(user)
    path.rename(path.parent.parent / "elsewhere")
    THINGS[thing](path)
    assert user.cache.in_the_way() == ([] if thing == "of another user" else [path])
    assert user.get(1) is None
    assert [record.getMessage().count(str(path)) for record in caplog.records] == [1]
    user.put(1)
    assert user.get(1) == data(1) and (path.parent.parent / "elsewhere").exists()


def test_a_folder_in_the_way_is_named_and_left(make: Make) -> None:
    user = make()
    user.put(1)
    path = main_file(user)
    path.unlink()
    (path / "file").mkdir(parents=True)
    assert user.cache.in_the_way() == [path]
    with pytest.raises(OSError, match="is not a regular file and must be removed") as caught:
        user.cache.open(path.name)
    assert caught.value.filename == str(path)
    (left,) = user.cache.clear().left
    assert left.filename == str(path) and path.is_dir()


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-BYTES // 2, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, grow, empty])
@pytest.mark.parametrize("shows", [True, False], ids=["times changed", "times as before"])
def test_a_damaged_file_is_removed_and_made_again(
    make: Make, kind: str, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], shows: bool
) -> None:
    """File times stay the same if a disk fails. The start does not read fetched weights to check them."""
    user = make()
    user.put(1)
    path = main_file(user)
    times = path.stat()
    damage(path)
    if not shows:
        if kind == "weights":
            pytest.skip("not noticed")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert user.get(1) is None and not path.exists()
    user.put(1)
    assert make().get(1) == data(1)
    if damage is flip:
        assert len(caplog.records) == 1 and str(path) in caplog.text


def test_other_files_in_the_folder_are_left_alone(make: Make) -> None:
    user = make(room=2)
    theirs = user.cache.path.parent / "theirs"
    theirs.mkdir()
    foreign = [user.cache.path / "notes.txt", theirs / f"old{user.suffix}", theirs / "old.tmp"]
    (user.cache.path / "link").symlink_to(theirs)
    for path in foreign:
        path.write_bytes(bytes(3 * BYTES))
        os.utime(path, (1, 1))
    for number in range(3):
        user.put(number)
    assert there(user, range(3)) == [1, 2] and user.cache.used_bytes < 3 * BYTES
    assert user.cache.clear().files > 0 and user.cache.files() == []
    assert all(path.exists() for path in foreign)


def test_a_cleared_cache_is_empty(make: Make) -> None:
    user = make()
    for number in range(3):
        user.put(number)
    (user.cache.path / "a.tmp").touch()
    (user.cache.path / "b.tmp").mkdir()
    (user.cache.path / f"c{user.suffix}").symlink_to("nothing")
    (user.cache.path / "lock").unlink()
    (user.cache.path / "lock").mkdir()
    names, held_bytes = len(list(user.cache.path.iterdir())), user.cache.used_bytes
    assert user.cache.clear() == Cleared(names - 1, held_bytes)
    assert [path.name for path in user.cache.path.iterdir()] == ["lock"] and there(user, range(3)) == []
    assert user.cache.clear() == Cleared()
    user.put(1)
    assert user.get(1) == data(1)


def test_a_cache_that_was_never_used_is_empty(kind: str, tmp_path: Path) -> None:
    cache = USERS[kind](tmp_path / "none", ROOM).cache
    assert (cache.files(), cache.used_bytes, cache.in_the_way(), cache.clear()) == ([], 0, [], Cleared())
    assert not cache.path.exists()
