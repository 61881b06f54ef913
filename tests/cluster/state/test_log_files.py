"""Tests of logs that grow without end, while their writers and readers have them open."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from llamaclust.cluster.membership.log_tail import last_error
from llamaclust.cluster.state import log_files
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord, open_log
from llamaclust.cluster.state.log_files import limit_logs
from llamaclust.core.regular_file import write_bytes
from support.clusters.command_line import eventually


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "MOST_LOG_BYTES", 4000)
    monkeypatch.setattr(log_files, "_KEPT_BYTES", 1000)


@pytest.mark.parametrize("name", ["a", "coordinator", "a.b-c"])
def test_a_log_is_bounded_and_its_end_is_kept(name: str, tmp_path: Path) -> None:
    log = tmp_path / f"{name}.log"
    writer = open_log(log, anew=True)
    written = 0
    try:
        for number in range(300):
            written += os.write(writer, f"line {number}\n".encode() * 10)
            limit_logs(tmp_path)
            assert log.stat().st_size <= 4000 and sum(file.stat().st_size for file in tmp_path.iterdir()) <= 5000
        assert written > 20_000
        kept = (tmp_path / f"{name}~.log").read_text() + log.read_text()
        assert kept.endswith("line 299\n") and "\0" not in kept
        assert [int(text[5:]) for text in kept.splitlines()[1:]] == sorted(
            int(text[5:]) for text in kept.splitlines()[1:]
        )
        assert last_error(log) == "line 299"
    finally:
        os.close(writer)


@pytest.mark.parametrize("thing", ["pipe", "link", "folder"])
def test_what_is_no_log_is_left_alone(thing: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(b"x" * 9000)
    at = tmp_path / "a.log"
    match thing:
        case "pipe":
            os.mkfifo(at)
        case "link":
            at.symlink_to(other)
        case _:
            at.mkdir()
    limit_logs(tmp_path)
    limit_logs(tmp_path / "missing")
    assert other.stat().st_size == 9000 and {path.name for path in tmp_path.iterdir()} == {"a.log", "other.txt"}


@pytest.mark.parametrize("thing", ["link", "file", "hard link"])
def test_what_takes_a_log_s_place_meanwhile_is_left_alone(
    thing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, log, moved = tmp_path / "other.txt", tmp_path / "a.log", tmp_path / "moved"
    other.write_bytes(b"x" * 9000)
    log.write_bytes(b"y" * 9000)

    def replace(path: Path, data: bytes, *, is_synced: bool) -> None:
        write_bytes(path, data, is_synced=is_synced)
        log.rename(moved)
        match thing:
            case "link":
                log.symlink_to(other)
            case "file":
                log.write_bytes(b"z" * 9000)
            case _:
                log.hardlink_to(other)

    monkeypatch.setattr(log_files, "write_bytes", replace)
    limit_logs(tmp_path)
    assert (other.stat().st_size, log.stat().st_size, moved.stat().st_size) == (9000, 9000, 0)
    assert (tmp_path / "a~.log").read_bytes() == b"y" * 1000


def test_a_log_that_filled_the_disk_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(b"y" * 9000)

    def full(path: Path, data: bytes, *, is_synced: bool) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(log_files, "write_bytes", full)
    limit_logs(tmp_path)
    assert log.stat().st_size == 0


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_logs_that_cannot_be_limited_do_not_keep_a_folder_from_coming_back(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = list[Path]()

    def fail(folder: Path) -> None:
        looked.append(folder)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("llamaclust.cluster.state.directory.limit_logs", fail)
    folder = ClusterDir(tmp_path / "home")
    record = ClusterRecord("home", os.getpid(), "http://127.0.0.1:1", "model")
    with folder.locked():
        folder.write_record(record)
        eventually(lambda: bool(looked), 60.0, "a look at the logs")
        folder.path.rename(tmp_path / "deleted")
        eventually(lambda: folder.is_running and folder.read_record() == record, 60.0, "the lock and the record")


def test_a_running_cluster_bounds_its_logs(tmp_path: Path) -> None:
    folder = ClusterDir(tmp_path / "home")
    with folder.locked():
        folder.log_file("a").write_bytes(b"line\n" * 2000)
        eventually(lambda: folder.log_file("a~").exists(), 60.0, "the copy of the log's end")
        assert [folder.log_file(name).stat().st_size for name in ("a", "a~")] == [0, 1000]
