"""What clusters leave on disk, and how other processes find them."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from llamaclust.cluster.state import ClusterDir
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
