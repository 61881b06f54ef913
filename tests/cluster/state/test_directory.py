"""Tests what clusters leave on disk, and how other processes find them."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord, open_log
from llamaclust.cluster.state.file_lock import FileLock
from llamaclust.cluster.state.measurements import read_profiles, write_profiles
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.profile import DeviceProfile, Profile
from llamaclust.core.regular_file import write_text
from llamaclust.core.this_machine import start_ticks
from support.clusters.command_line import eventually


def test_checks_for_a_running_cluster_disturb_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that checks is neither taken for a cluster nor in the way of a start."""
    folder = ClusterDir(tmp_path / "home")
    with folder.locked():
        assert folder.is_running
        with pytest.raises(UsageError, match="already running"), folder.locked():
            pass
    looking = os.open(folder.path / "lock", os.O_RDWR)
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert not folder.is_running
    take = FileLock.take

    def take_and_end_the_look(lock: FileLock) -> bool:
        is_taken = take(lock)
        if not is_taken:
            os.close(looking)
        return is_taken

    monkeypatch.setattr(FileLock, "take", take_and_end_the_look)
    with folder.locked():
        assert folder.is_running
    assert not folder.is_running


def test_a_folder_in_place_of_a_lock_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "home" / "lock").mkdir(parents=True)
    with (
        pytest.raises(UsageError, match="home/lock is a folder, but must be a lock file"),
        ClusterDir(tmp_path / "home").locked(),
    ):
        pass


def test_a_lock_ends_the_record_of_a_killed_process(tmp_path: Path) -> None:
    folder = ClusterDir(tmp_path / "home")
    with folder.locked():
        folder.write_record(ClusterRecord("home", os.getpid(), "http://127.0.0.1:1", "m"))
    assert folder.read_record() is not None
    with folder.locked():
        assert folder.read_record() is None


def test_a_record_signals_no_process_that_started_at_another_time() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            own = ClusterRecord("home", os.getpid(), "http://127.0.0.1:1", "m")
            with pytest.raises(LlamaclustError, match=rf"its record has pid {process.pid}, which is not its"):
                replace(own, pid=process.pid).signal(signal.SIGTERM)
            assert process.poll() is None
            replace(own, pid=process.pid, start_ticks=start_ticks(process.pid) or 0).signal(signal.SIGTERM)
            assert process.wait() == -signal.SIGTERM
        finally:
            process.kill()


def test_a_log_is_a_plain_file(tmp_path: Path) -> None:
    folder, victim = ClusterDir(tmp_path / "home"), tmp_path / "victim"
    victim.write_text("precious")
    folder.create()
    folder.log_file("a").symlink_to(victim)
    folder.log_file("b").mkdir()
    os.mkfifo(folder.log_file("c"))
    for name in "abc":
        with pytest.raises(UsageError, match=rf"{name}\.log is not a regular file, but must be a log file"):
            open_log(folder.log_file(name), anew=True)
    assert victim.read_text() == "precious"


def test_a_log_begins_anew_or_goes_on(tmp_path: Path) -> None:
    for anew, text in ((True, "one"), (False, "onetwo"), (True, "three")):
        with os.fdopen(open_log(tmp_path / "a.log", anew=anew), "a") as file:
            file.write(text.removeprefix("one") or text)
        assert (tmp_path / "a.log").read_text() == text


def test_a_state_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = ClusterDir(tmp_path / "shared" / "home")
    folder.path.parent.mkdir()
    folder.path.parent.chmod(0o777)
    with pytest.raises(UsageError, match=rf"other users can write to it; run: chmod o-w {folder.path.parent}$"):
        folder.create()
    folder.path.parent.chmod(0o1777)
    folder.create()


def test_a_state_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ClusterDir(tmp_path / "home")
    folder.create()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UsageError, match=rf"home belongs to user {os.getuid()}, and this process runs as user"):
        folder.create()
    with pytest.raises(UsageError, match=r"a\.log belongs to user"):
        open_log(folder.log_file("a"), anew=True)


def test_a_folder_that_is_deleted_under_a_cluster_comes_back(tmp_path: Path) -> None:
    folder = ClusterDir(tmp_path / "home")
    record = ClusterRecord("home", os.getpid(), "http://127.0.0.1:1", "m")
    with folder.locked():
        folder.write_record(record)
        for number in range(2):  # Another thread may write into the folder while it is removed.
            folder.path.rename(tmp_path / f"deleted{number}")
            eventually(lambda: folder.is_running and folder.read_record() == record, 60.0, "the folder again")
            assert folder.logs.is_dir()
            with pytest.raises(UsageError, match=rf"already running \(pid {os.getpid()}"), folder.locked():
                pass
    assert not folder.is_running


def test_a_record_that_is_deleted_under_a_cluster_comes_back(tmp_path: Path) -> None:
    folder = ClusterDir(tmp_path / "home")
    with folder.locked():
        folder.write_record(ClusterRecord("home", os.getpid(), "http://127.0.0.1:1", "m"))
        (folder.path / "cluster.json").unlink()
        eventually(lambda: folder.read_record() is not None, 30.0, "the record")


def test_a_cluster_whose_name_was_taken_meanwhile_leaves_the_other_alone(tmp_path: Path) -> None:
    folder = ClusterDir(tmp_path / "home")
    other = ClusterRecord("home", 1, "http://127.0.0.1:2", "m")
    with folder.locked():
        (folder.path / "lock").unlink()
        with folder.locked():
            ClusterDir(folder.path).write_record(other)
            folder.remove_record(is_stopped=True)
            assert folder.read_record() == other and not (folder.path / "stopped").exists()
    folder.remove_record()
    assert folder.read_record() is None


@contextmanager
def full_disk(room_bytes: int) -> Iterator[None]:
    """Limits the size of every file to `room_bytes`."""
    before, soft_and_hard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, soft_and_hard[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_and_hard)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_told_with_the_file_and_leaves_none(tmp_path: Path) -> None:
    known = {"a": Profile(DeviceProfile(1.0, 2.0))}
    write_profiles(tmp_path, known)
    folder = ClusterDir(tmp_path / "home")
    folder.create()
    before = sorted(tmp_path.rglob("*"))
    with full_disk(10):
        with pytest.raises(LlamaclustError, match=rf"^{tmp_path}/\.profiles\.json: cannot be written: File too large"):
            write_profiles(tmp_path, {"b": Profile(DeviceProfile(3.0, 4.0))})
        with pytest.raises(LlamaclustError, match=r"/home/cluster\.json: cannot be written"):
            folder.write_record(ClusterRecord("home", 1, "http://127.0.0.1:1", "m"))
    assert sorted(tmp_path.rglob("*")) == before
    assert read_profiles(tmp_path) == known


def test_a_file_that_several_write_at_once_is_one_of_theirs(tmp_path: Path) -> None:
    """Pods that share a volume write like this, and each of their processes has the same id."""
    path, texts = tmp_path / "file", [letter * 50_000 for letter in "abcd"]

    def write(text: str) -> None:
        for _ in range(10):
            write_text(path, text, is_synced=False)

    with ThreadPoolExecutor(len(texts)) as pool:
        assert list(pool.map(write, texts)) == [None] * len(texts)
    assert path.read_text() in texts and path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_standby_that_waits_is_seen(tmp_path: Path) -> None:
    folder = ClusterDir(tmp_path / "home")

    def wait() -> None:
        with ClusterDir(folder.path).locked(is_standby=True):
            pass

    standby = threading.Thread(target=wait)
    with folder.locked():
        assert not folder.has_standby
        standby.start()
        eventually(lambda: folder.has_standby, 60.0, "a standby")
    standby.join(60)
    assert not standby.is_alive() and not folder.has_standby


@pytest.mark.parametrize("deleted", ["folder", "lock"])
def test_a_standby_waits_on_while_the_files_of_a_running_cluster_are_deleted(tmp_path: Path, deleted: str) -> None:
    """The running coordinator makes its files again."""
    folder, served = ClusterDir(tmp_path / "home"), list[bool]()

    def wait() -> None:
        with ClusterDir(folder.path).locked(is_standby=True) as is_held:
            served.append(is_held)

    standby = threading.Thread(target=wait)
    with folder.locked():
        standby.start()
        eventually(lambda: folder.has_standby, 60.0, "a standby")
        lock = folder.path / "lock"
        before = lock.stat().st_ino, os.open(lock, os.O_RDONLY)  # keeps the inode number in use
        if deleted == "lock":
            lock.unlink()
        else:
            folder.path.rename(tmp_path / "deleted")
        eventually(lambda: lock.exists() and lock.stat().st_ino != before[0], 60.0, "another lock")
        eventually(lambda: folder.is_running and folder.has_standby, 60.0, "both processes' locks")
        assert served == [] and standby.is_alive()
        os.close(before[1])
    standby.join(60)
    assert served == [True]


async def test_terms_and_drained_workers_survive_a_power_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is on disk before its rename, and the rename before the call returns."""
    fsync, rename, done = os.fsync, Path.replace, list[str]()

    def synced(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        done.append("replace")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    record = ControlRecord.begin(tmp_path / "control.json")
    assert done == ["file", "replace", "folder"]
    await record.drain(frozenset("a"))
    await record.drain(frozenset("a"))
    await record.admits(7)
    assert done == ["file", "replace", "folder"] * 3


@pytest.mark.parametrize("end", ["stopped", "stopped without a record", "failed", "failed after a stop"])
def test_a_standby_ends_with_an_orderly_stop_alone(tmp_path: Path, end: str) -> None:
    """A coordinator that fails removes its record as well."""
    folder, served = ClusterDir(tmp_path / "home"), []

    def wait() -> None:
        with ClusterDir(folder.path).locked(is_standby=True) as is_held:
            served.append(is_held)

    if end == "failed after a stop":
        with folder.locked():
            folder.remove_record(is_stopped=True)
    standby = threading.Thread(target=wait)
    with folder.locked():
        if end != "stopped without a record":
            folder.write_record(ClusterRecord("home", os.getpid(), "http://127.0.0.1:1", "m"))
        standby.start()
        eventually(lambda: folder.has_standby, 60.0, "a standby")
        folder.remove_record(is_stopped=end.startswith("stopped"))
    standby.join(60)
    assert served == [end.startswith("failed")]
    with folder.locked(is_standby=True) as is_held:  # the next standby has nothing to wait for
        assert is_held


@pytest.mark.parametrize(
    "text",
    [
        *('{"term": 1e999, "drained": []}', '{"term": -5, "drained": []}', '{"term": 4294967295, "drained": []}'),
        *('{"term": 1, "drained": "abc"}', "[" * 100_000, "\xff", "", "7", '{"term": ' + "9" * 5_000 + "}"),
    ],
    ids=lambda text: str(text)[:24],
)
async def test_a_damaged_control_record_stops_no_start(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Workers know the largest term, and a new coordinator begins above that."""
    path = tmp_path / "control.json"
    path.write_text(text, "latin-1")
    record = ControlRecord.begin(path)
    assert (record.term, record.drained) == (1, frozenset()) and "cannot be read" in caplog.text
    assert await record.admits(7) and ControlRecord.begin(path).term == 9


@pytest.mark.parametrize("kind", ["pipe", "link to a device without end"])
def test_a_control_record_that_is_no_file_is_not_read_for_ever(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "control.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert ControlRecord.begin(path).term == 1
    assert path.is_file() and not path.is_symlink()


def test_a_damaged_record_of_a_cluster_signals_no_process(tmp_path: Path) -> None:
    """The pid of a damaged record could be that of a process group, or of every process."""
    folder = ClusterDir(tmp_path / "home")
    sound = asdict(ClusterRecord("home", os.getpid(), "http://127.0.0.1:1", "m"))
    with folder.locked():
        for wrong in ({"pid": -1, "start_ticks": None}, {"pid": 0, "start_ticks": None}, {"pid": "self"}, {"api": 5}):
            (folder.path / "cluster.json").write_text(json.dumps(sound | wrong))
            assert folder.read_record() is None
        (folder.path / "cluster.json").write_text("[" * 100_000)
        assert folder.read_record() is None and "already running" in folder._taken()
