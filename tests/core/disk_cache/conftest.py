"""Fixtures for tests of the disk cache. Each test runs with each of the four kinds of caches."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.disk_caches import BYTES, ROOM, USERS, Make, User


@pytest.fixture(params=USERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(kind: str, tmp_path: Path) -> Make:
    """Returns a function that opens a cache with space for `room` files, or with ROOM bytes if `room` is None."""

    def make(room: int | None = None, path: Path = tmp_path / "home" / "cache") -> User:
        user = USERS[kind](path, 0)
        most_bytes = ROOM if room is None else room * (BYTES + user.overhead_bytes) + BYTES // 2
        user = USERS[kind](path, most_bytes)
        user.cache.create()
        return user

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a file system of 1 MiB and yields its path. Skips the test if mounting is not permitted."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)
