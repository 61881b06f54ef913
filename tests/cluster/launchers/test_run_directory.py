"""Tests of files in the place of a run directory: they are removed or named, and no pipe blocks a start."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from llamaclust.cluster.launchers.run_directory import run_directory
from llamaclust.core.errors import UsageError


@pytest.mark.parametrize("kind", ["pipe", "file", "socket"])
def test_what_is_no_directory_is_in_the_way(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "run"
    with socket.socket(socket.AF_UNIX) as bound:
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "file":
            place.touch()
        else:
            bound.bind(str(place))
        with pytest.raises(UsageError, match=r"run is in the way of the folder"), run_directory(tmp_path):
            pass
    assert os.path.lexists(place)


def test_a_link_to_a_pipe_among_temporary_directories_is_removed_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipe = tmp_path / "llamaclust-pipe"
    os.mkfifo(pipe)
    parent = tmp_path / "cluster"
    parent.mkdir()
    (parent / "run").symlink_to(pipe)
    with run_directory(parent) as made:
        assert made.path.is_dir()
    assert pipe.is_fifo() and not os.path.lexists(parent / "run")
