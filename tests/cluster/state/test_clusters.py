"""Tests how other processes find clusters, and what they say of clusters that have ended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llamaclust.cluster.state.clusters import find_running
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from llamaclust.core.errors import UsageError

RECORD = ClusterRecord("home", os.getpid(), "http://127.0.0.1:1", "m")


def test_a_cluster_of_another_state_directory_is_found_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tmp_path / "usual"
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(usual))
    folder = ClusterDir(tmp_path / "own" / "home")
    record = RECORD
    with folder.locked():
        folder.write_record(record)
        for name in (None, "home"):
            found, found_record = find_running(usual, name)
            assert found_record == record and found.log_file("a").parent.samefile(folder.logs)
            assert found.is_running and found.path == folder.path  # the folder outlives its link
        nearer = ClusterDir(usual / "home")
        with nearer.locked():
            nearer.write_record(record)
            assert find_running(usual, "home")[0] == nearer
            nearer.remove_record()
        folder.remove_record()
    assert list((usual / ".elsewhere").iterdir()) == []
    with pytest.raises(UsageError, match=r"start one with `llamaclust up`$"):
        find_running(usual, None)
    nearer.log_file("a").touch()
    older = ClusterDir(usual / "older").log_file("a")
    older.parent.mkdir(parents=True)
    older.touch()
    os.utime(nearer.log_file("a"), (2e9, 2e9))
    os.utime(older.parent, (2e9, 2e9))  # time of the last new file in the folder
    with pytest.raises(UsageError, match=rf"no cluster is running: .*; logs of the last cluster: {nearer.logs}"):
        find_running(usual, None)
    with pytest.raises(UsageError, match=r"start one with `llamaclust up`$"):
        find_running(tmp_path / "nowhere", None)


def test_a_cluster_without_a_record_is_starting_or_ending(tmp_path: Path) -> None:
    home, other = ClusterDir(tmp_path / "home"), ClusterDir(tmp_path / "other")
    with home.locked():
        for name in (None, "home"):
            with pytest.raises(UsageError, match="cluster home is starting or ending: try again"):
                find_running(tmp_path, name)
        with pytest.raises(UsageError, match="no cluster is running"):
            find_running(tmp_path, "other")
        with other.locked():
            other.write_record(RECORD)
            assert find_running(tmp_path, None)[0] == other
            with pytest.raises(UsageError, match="cluster home is starting"):
                find_running(tmp_path, "home")


def test_a_log_that_leads_nowhere_is_no_error(tmp_path: Path) -> None:
    folder = ClusterDir(tmp_path / "home")
    folder.create()
    folder.log_file("a").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=f"logs of the last cluster: {folder.logs}"):
        find_running(tmp_path, None)


@pytest.mark.parametrize("has_logs", [True, False])
def test_a_killed_cluster_is_named_and_no_other_ones_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_logs: bool
) -> None:
    """The cluster has another state directory, and may have no logs, like a static one whose workers log elsewhere."""
    usual = tmp_path / "usual"
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(usual))
    other, killed = ClusterDir(usual / "other"), ClusterDir(tmp_path / "own" / "home")
    for folder in (other, killed):
        folder.create()
    other.log_file("a").touch()
    with killed.locked():
        killed.write_record(RECORD)
    if has_logs:
        killed.log_file("a").touch()
    os.utime(other.log_file("a"), (2e9, 2e9))
    hint = "; home ended unexpectedly" + (f", its logs: {killed.logs}" if has_logs else "")
    for name in (None, "home"):
        with pytest.raises(UsageError) as raised:
            find_running(usual, name)
        assert str(raised.value) == f"no cluster is running: start one with `llamaclust up`{hint}"
    with other.locked():
        other.write_record(RECORD)
        with pytest.raises(UsageError) as raised:
            find_running(usual, "home")
        assert str(raised.value) == f"no cluster named 'home' is running: choose one of other with --cluster{hint}"
