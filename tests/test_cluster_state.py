"""What clusters leave on disk, and how other processes find them."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from llamaclust.cluster.state import ClusterDir, ClusterRecord, find_running
from llamaclust.errors import UsageError


def test_looking_whether_a_cluster_runs_disturbs_nobody(tmp_path: Path) -> None:
    """One who looks is neither taken for a cluster by another, nor in the way of a start."""
    folder = ClusterDir(tmp_path / "home")
    with folder.locked():
        assert folder.is_running
        with pytest.raises(UsageError, match="already running"), folder.locked():
            pass
    looking = os.open(folder.path / "lock", os.O_RDWR)
    fcntl.flock(looking, fcntl.LOCK_SH)
    assert not folder.is_running
    leaving = threading.Timer(0.01, os.close, (looking,))
    leaving.start()
    with folder.locked():
        assert folder.is_running
    leaving.join()
    assert not folder.is_running


def test_a_cluster_of_another_state_directory_is_found_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tmp_path / "usual"
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(usual))
    folder = ClusterDir(tmp_path / "own" / "home")
    record = ClusterRecord("home", 1, "http://127.0.0.1:1", "m")
    with folder.locked():
        folder.write_record(record)
        for name in (None, "home"):
            found, found_record = find_running(usual, name)
            assert found_record == record and found.log_file("a").parent.samefile(folder.logs)
            assert found.is_running
        nearer = ClusterDir(usual / "home")
        with nearer.locked():
            nearer.write_record(record)
            assert find_running(usual, "home")[0] == nearer
            nearer.remove_record()
        folder.remove_record()
    assert list((usual / ".elsewhere").iterdir()) == []
    with pytest.raises(UsageError, match="no cluster is running"):
        find_running(usual, None)
