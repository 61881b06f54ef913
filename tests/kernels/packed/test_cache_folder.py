"""Tests of the packed-weight cache's folder: times of use, locks between processes, and file systems."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llamaclust.cli.app import app
from llamaclust.core.disk_cache import files
from llamaclust.core.disk_cache.files import BusyError, Writing, used_ns
from llamaclust.kernels.packed.cache_folder import Entry, PackedCacheFolder
from llamaclust.model.gguf.file_systems import file_system, is_remote

DATA = memoryview(bytes(range(256)) * 16)


@pytest.fixture
def folder(tmp_path: Path) -> PackedCacheFolder:
    made = PackedCacheFolder(tmp_path / "packed", 1 << 20)
    made.create()
    return made


def store(folder: PackedCacheFolder, key: str, data: memoryview = DATA, since_ns: int = 0) -> None:
    entry = Entry(key, "m.gguf", "blk.0", sha256(data).hexdigest(), len(data), 7)
    folder.store(entry, data, since_ns, Writing())


def test_what_a_load_used_is_never_older_than_the_load(folder: PackedCacheFolder) -> None:
    """A file's own time stamp may lag by one tick of the kernel's clock."""
    for number in range(50):
        since_ns = time.time_ns()
        store(folder, str(number), memoryview(number.to_bytes(8)))
        (path,) = folder.path.glob("*.tiles")
        assert used_ns(path.stat()) >= since_ns
        since_ns = time.time_ns()
        assert folder.find(str(number)) is not None
        assert used_ns(path.stat()) >= since_ns
        folder.clear()


def test_an_image_that_is_there_takes_no_room(folder: PackedCacheFolder) -> None:
    full = PackedCacheFolder(folder.path, len(DATA) + 500)  # plus two entries
    store(full, "a")
    (path,) = full.path.glob("*.tiles")
    before = path.stat()
    store(full, "b", since_ns=time.time_ns())
    after = path.stat()
    assert after.st_ino == before.st_ino
    assert used_ns(after) > used_ns(before)
    assert full.find("a") is not None and full.find("b") is not None


def test_an_image_of_another_size_is_written_again(folder: PackedCacheFolder) -> None:
    store(folder, "a")
    (path,) = folder.path.glob("*.tiles")
    os.truncate(path, 100)
    store(folder, "b")
    assert path.read_bytes() == DATA


@pytest.mark.parametrize(
    "damage",
    [{"checksum": "7"}, {"n_bytes": None}, {"image": 3}, {"image": "../other"}, {"model": []}, {"more": 1}],
)
def test_a_damaged_entry_is_none(folder: PackedCacheFolder, damage: dict[str, object]) -> None:
    store(folder, "a")
    (folder.path.parent / "other.tiles").write_bytes(DATA)
    (path,) = folder.path.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_bytes()) | damage))
    assert folder.find("a") is None and folder.list_models() == []
    store(folder, "a")
    assert folder.find("a") is not None


@contextmanager
def held(folder: PackedCacheFolder) -> Iterator[None]:
    with (folder.path / "lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_no_process_waits_long_for_the_lock(folder: PackedCacheFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LOCK_WAIT_S", 0.1)
    monkeypatch.setenv("LLAMACLUST_HOME", str(folder.path.parent))
    with held(folder):
        with pytest.raises(BusyError, match="another process"):
            store(folder, "a")
        result = CliRunner().invoke(app, ["model", "cache", "clear"])
        assert result.exit_code != 0
        assert (
            f"{folder.path}: cannot be cleared: another process has written there for 0.1 s"
            in str(result.exception) + result.output
        )
    store(folder, "a")
    assert folder.find("a") is not None


MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:40 / /home rw - nfs4 server:/home rw,hard
31 30 0:41 / /home/a\040b rw - tmpfs tmpfs rw
32 22 0:42 / /mnt rw - ext4 /dev/sda rw
33 22 0:43 / /mnt rw shared:7 master:1 - fuse.sshfs me@server: rw
""".strip().splitlines()


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/x", "ext4"), ("/homes/x", "ext4"), ("/home/u", "nfs4"), ("/home/a b/c", "tmpfs"), ("/mnt/x", "fuse.sshfs")],
)
def test_the_file_system_is_the_one_mounted_nearest(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert file_system(Path(path), MOUNTS) == kind
    monkeypatch.setattr(Path, "read_text", lambda self, **how: "\n".join(MOUNTS))
    assert is_remote(Path(path)) == (kind in ("nfs4", "fuse.sshfs"))
