"""Tests of control group limits (versions 1 and 2), with folders in place of the system's files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from llamaclust.core import cgroups
from llamaclust.core.cgroups import memory_groups
from llamaclust.model.loader import Model
from llamaclust.model.weights.manifest import make_manifest
from llamaclust.worker.devices.system_info import (
    available_memory_bytes,
    memory_group,
    total_memory_bytes,
)
from support.models.tiny_model import build_tiny_model

_GIB = 1 << 30
_V2 = "sys/fs/cgroup"
_V1 = "sys/fs/cgroup/memory"


def _machine(root: Path, cgroup: str, groups: Mapping[str, Mapping[str, object]], meminfo: str = "") -> Path:
    files: dict[str, object] = {"proc/self/cgroup": cgroup, "proc/meminfo": meminfo}
    files |= {f"{folder}/{name}": text for folder, group in groups.items() for name, text in group.items()}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def _v2(limit: object, used: int, **stat: int) -> dict[str, object]:
    lines = "\n".join(f"{name} {number}" for name, number in {"anon": 5, **stat}.items())
    return {"memory.max": limit, "memory.current": used, "memory.stat": lines}


def _v1(limit: int, used: int, **stat: int) -> dict[str, object]:
    lines = "\n".join(f"{name} {number}" for name, number in stat.items())
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": lines}


def test_page_cache_is_free_memory_of_a_group(tmp_path: Path) -> None:
    group = _v2(4 * _GIB, 3 * _GIB + 6 * (_GIB // 10), inactive_file=3 * _GIB)
    root = _machine(tmp_path, "0::/a.slice/w.scope", {f"{_V2}/a.slice/w.scope": group}, "MemAvailable: 67108864 kB")
    assert available_memory_bytes(root) == 4 * _GIB - 6 * (_GIB // 10), "not 0.4 GiB"
    assert total_memory_bytes(root) == 4 * _GIB


def test_mapped_files_are_used_memory_of_a_group(tmp_path: Path) -> None:
    group = _v2(4 * _GIB, 3 * _GIB, inactive_file=_GIB, active_file=_GIB, file_mapped=_GIB + _GIB // 2)
    [found] = memory_groups(_machine(tmp_path, "0::/w", {f"{_V2}/w": group}))
    assert found.free_bytes == _GIB + _GIB // 2


def test_the_tightest_of_all_ancestors_limits(tmp_path: Path) -> None:
    groups = {f"{_V2}/a": _v2(2 * _GIB, _GIB), f"{_V2}/a/b": _v2("max", 9), f"{_V2}/a/b/c": _v2(8 * _GIB, 9)}
    root = _machine(tmp_path, "0::/a/b/c", groups, "MemAvailable: 67108864 kB")
    assert (available_memory_bytes(root), total_memory_bytes(root)) == (_GIB, 2 * _GIB)
    assert [group.path.name for group in memory_groups(root)] == ["c", "a"]


def test_groups_of_version_1_limit(tmp_path: Path) -> None:
    cached = {
        "total_inactive_file": _GIB,
        "total_active_file": _GIB,
        "total_mapped_file": _GIB // 2,
        "inactive_file": 7,
    }
    groups = {f"{_V1}/pod": _v1(6 * _GIB, 5 * _GIB, **cached), f"{_V1}/pod/w": _v1((1 << 63) - 4096, 5 * _GIB)}
    root = _machine(tmp_path, "9:cpu:/\n4:memory:/pod/w\n0::/", groups, "MemAvailable: 67108864 kB")
    assert available_memory_bytes(root) == 2 * _GIB + _GIB // 2
    assert total_memory_bytes(root) == 6 * _GIB


@pytest.mark.parametrize("path", ["/docker/0123", "/../other"], ids=["path of the host", "outside of the namespace"])
def test_a_container_sees_its_group_as_the_root_of_the_mount(tmp_path: Path, path: str) -> None:
    root = _machine(tmp_path / "v1", f"4:memory:{path}", {_V1: _v1(_GIB, 5)}, "MemAvailable: 67108864 kB")
    assert available_memory_bytes(root) == _GIB - 5
    root = _machine(tmp_path / "v2", f"0::{path}", {_V2: _v2(_GIB, 5)}, "MemAvailable: 67108864 kB")
    assert available_memory_bytes(root) == _GIB - 5


def test_mapped_files_are_not_available_on_a_machine_without_limits(tmp_path: Path) -> None:
    """MemAvailable includes mapped files. A worker adds its own mapped images to the available memory itself."""
    meminfo = "MemAvailable: 8388608 kB\nMapped: 3145728 kB\nShmem: 1048576 kB"
    root = _machine(tmp_path, "0::/", {}, meminfo)
    assert available_memory_bytes(root) == 6 * _GIB
    (root / "proc/self/status").write_text("VmRSS:  9 kB\nRssFile:\t 4194304 kB\n")
    assert available_memory_bytes(root) == 4 * _GIB
    assert memory_groups(root) == []


@pytest.mark.parametrize("is_limited", [True, False])
def test_what_is_read_once_leaves_the_page_cache_of_a_limited_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_limited: bool
) -> None:
    dropped = []
    monkeypatch.setattr(cgroups, "is_memory_limited", lambda: is_limited)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, n_bytes, advice: dropped.append((offset, n_bytes)))
    with Model.open(build_tiny_model(tmp_path / "m.gguf")) as model:
        make_manifest(model.file)
        wanted = {(tensor.offset, tensor.n_bytes) for tensor in model.file.tensors.values()}
    assert set(dropped) == (wanted if is_limited else set())


def test_workers_of_one_limited_group_have_the_same_identity_of_it(tmp_path: Path) -> None:
    groups = {f"{_V2}/a": _v2(2 * _GIB, _GIB), f"{_V2}/a/b": _v2("max", 9), f"{_V2}/a/c": _v2(_GIB, 9)}
    names = []
    for place in ("/a", "/a/b", "/a/c", "/"):
        names.append(memory_group(_machine(tmp_path, f"0::{place}", groups)))
    assert names[0] == names[1] != "" and names[2] not in (names[0], "") and names[3] == ""
