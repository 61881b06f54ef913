"""Tests of core detection on machines whose /proc and /sys are files in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llamaclust.core.errors import UsageError
from llamaclust.worker.devices.cores import bind_to_node, physical_cores, read_cores

_CPU = "sys/devices/system/cpu"
_NODE = "sys/devices/system/node"
Files = dict[str, object]


def _written(root: Path, files: Mapping[str, object]) -> Path:
    for name, text in {"proc/self/cgroup": "0::/a", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def _siblings(*cores: str) -> Files:
    """Returns files with the hardware threads of each core, as in "0,4"; numbers are unique across sockets."""
    files: Files = {}
    for core in cores:
        ends = [int(number) for number in core.replace("-", ",").split(",")]
        numbers = range(ends[0], ends[-1] + 1) if "-" in core else ends
        files |= {f"{_CPU}/cpu{number}/topology/thread_siblings_list": core for number in numbers}
    return files | {f"{_CPU}/online": f"0-{len(files) - 1}"}


def _desktop() -> Files:
    return _siblings("0,4", "1,5", "2,6", "3,7")


def _raspberry_pi() -> Files:
    return _siblings("0", "1", "2", "3") | {f"{_CPU}/cpu{number}/cpu_capacity": 1024 for number in range(4)}


def _hybrid_laptop() -> Files:
    """Returns 6 performance cores of two hardware threads and 8 efficiency cores; their capacities have no effect."""
    performance = [f"{number}-{number + 1}" for number in range(0, 12, 2)]
    files = _siblings(*performance, *map(str, range(12, 20)))
    files |= {f"{_CPU}/cpu{number}/cpu_capacity": 1024 if number < 12 else 800 for number in range(20)}
    return files | {"sys/devices/cpu_core/cpus": "0-11", "sys/devices/cpu_atom/cpus": "12-19"}


def _meteor_lake() -> Files:
    """Returns files of Linux 6.13 or later, which lists cores of the low-power island separately."""
    files = _siblings("0-1", "2-3", "4", "5", "6", "7")
    return files | {
        "sys/devices/cpu_core/cpus": "0-3",
        "sys/devices/cpu_atom/cpus": "4-5",
        "sys/devices/cpu_lowpower/cpus": "6-7",
    }


def _big_little() -> Files:
    """Returns a cluster of little cores, one of big cores, and a prime core."""
    capacities = [400] * 4 + [870] * 3 + [1024]
    files = _siblings(*map(str, range(8)))
    return files | {f"{_CPU}/cpu{number}/cpu_capacity": capacity for number, capacity in enumerate(capacities)}


def _two_sockets() -> Files:
    """Returns two sockets of 8 cores and 16 hardware threads each, numbered alternately, as BIOSes do."""
    files = _siblings(*(f"{core},{core + 16}" for core in range(16)))
    for node in range(2):
        files[f"{_NODE}/node{node}/cpulist"] = ",".join(map(str, range(node, 32, 2)))
    return files


def _container() -> Files:
    return _desktop() | {"sys/fs/cgroup/a/cpu.max": "150000 100000"}


def _blind_virtual_machine() -> Files:
    """Returns a virtual machine that shows each virtual processor as a core."""
    return _siblings(*map(str, range(4))) | {f"{_NODE}/node0/cpulist": "0-3"}


@pytest.mark.parametrize(
    ("files", "affinity", "count", "line"),
    [
        (_desktop, range(8), 4, "4 compute threads for 4 physical cores (8 hardware threads)"),
        (_raspberry_pi, range(4), 4, "4 compute threads for 4 physical cores"),
        (
            _hybrid_laptop,
            range(20),
            14,
            "14 compute threads for 14 physical cores (6 performance, 8 efficiency; 20 hardware threads)",
        ),
        (
            _meteor_lake,
            range(8),
            6,
            "6 compute threads for 6 physical cores (2 performance, 4 efficiency; 8 hardware threads)",
        ),
        (_big_little, range(8), 8, "8 compute threads for 8 physical cores (4 performance, 4 efficiency)"),
        (_big_little, range(4, 8), 4, "4 compute threads for 4 physical cores (4 of 8 hardware threads, by affinity"),
        (_two_sockets, range(32), 16, "16 compute threads for 16 physical cores (32 hardware threads)"),
        (
            _container,
            range(8),
            2,
            "2 compute threads for 4 physical cores (8 hardware threads) with a CPU quota of 1.5",
        ),
        (
            _desktop,
            range(1, 8, 2),
            2,
            "2 compute threads for 2 physical cores (4 of 8 hardware threads, by affinity or cpuset)",
        ),
        (_blind_virtual_machine, range(4), 4, "4 compute threads for 4 physical cores"),
        (dict, [2, 3], 2, "2 compute threads for 2 physical cores"),
        (dict, [2], 1, "1 compute thread for 1 physical core"),
    ],
    ids=[
        *("desktop", "raspberry pi", "hybrid laptop", "meteor lake", "big.LITTLE", "big of big.LITTLE", "two sockets"),
        *("container", "cpuset of odd numbers", "virtual machine", "no sysfs", "one core"),
    ],
)
def test_one_thread_for_each_core_that_may_be_used(
    tmp_path: Path, files: Callable[[], Files], affinity: range, count: int, line: str
) -> None:
    found = read_cores(_written(tmp_path, files()), affinity)
    assert found.count == count == physical_cores(tmp_path, affinity)
    assert found.threads_text(count).startswith(line)
    assert "slower" not in found.threads_text(count)


def test_more_threads_than_cores_are_advised_against(tmp_path: Path) -> None:
    found = read_cores(_written(tmp_path, _container()), range(8))
    assert found.threads_text(3).endswith("CPU quota of 1.5; more threads than that are slower: set threads to 2")
    assert "slower" not in found.threads_text(1)


def test_nodes_of_two_sockets(tmp_path: Path) -> None:
    found = read_cores(_written(tmp_path, _two_sockets()), range(32))
    assert found.nodes == (0, 1)
    assert found.on_node(1).hardware_threads == tuple(range(1, 32, 2))
    assert found.on_node(1).count == 8
    line, advice = found.lines(16)
    assert line == found.threads_text(16)
    assert advice.startswith("2 NUMA nodes: one worker per node") and "--numa-node 0 and --numa-node 1" in advice
    assert found.on_node(1).lines(8) == (found.on_node(1).threads_text(8),)
    assert read_cores(tmp_path, range(0, 32, 2)).nodes == (0,), "those of the affinity"
    with pytest.raises(
        UsageError, match="numa_node 2: this process may not use the cores of this node, only those of NUMA node 0, 1"
    ):
        found.on_node(2)


def test_a_thread_is_bound_to_the_cores_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, numbers: bound.append(numbers))
    bind_to_node(1, _written(tmp_path, _two_sockets()))
    assert bound == [tuple(range(1, 16, 2))], "none outside of the affinity"
    with pytest.raises(UsageError):
        bind_to_node(5, tmp_path)


@pytest.mark.parametrize(
    ("cgroup", "groups", "count"),
    [
        ("0::/a/b", {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a", {"a/cpu.max": "1000000 100000"}, 4),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": 50000, "cpu/a/cpu.cfs_period_us": 100000}, 1),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": -1, "cpu/a/cpu.cfs_period_us": 100000}, 4),
    ],
    ids=["rounded up", "more than there are", "half a core", "no quota"],
)
def test_a_quota_of_cpu_time_limits_threads(
    tmp_path: Path, cgroup: str, groups: Mapping[str, object], count: int
) -> None:
    quotas = {f"sys/fs/cgroup/{name}": text for name, text in groups.items()}
    assert physical_cores(_written(tmp_path, _desktop() | quotas | {"proc/self/cgroup": cgroup}), range(8)) == count


def test_this_machine_has_cores() -> None:
    found = read_cores()
    assert set(found.hardware_threads) == os.sched_getaffinity(0)
    assert 1 <= found.count <= len(found.hardware_threads) <= found.online
