"""Tests of other programs' load during measurements: what counts as theirs, and which measurements are doubtful."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamaclust.cluster.state import measurements as load_module
from llamaclust.cluster.state.measurements import (
    CpuSeconds,
    LoadMeter,
    OtherLoad,
    disturbance,
    other_load,
    read_other_loads,
    read_profiles,
    write_profiles,
)
from llamaclust.core.profile import DeviceProfile, Profile

START = CpuSeconds(busy=1000.0, stolen=50.0, own=3.0, at=10.0)


def after(busy: float, stolen: float, own: float, seconds: float = 10.0) -> OtherLoad | None:
    """Returns the load in a measurement of two cores, from the seconds that were counted."""
    end = CpuSeconds(START.busy + busy, START.stolen + stolen, START.own + own, START.at + seconds)
    return other_load(START, end, 2)


@pytest.mark.parametrize(
    ("busy", "stolen", "own", "text"),
    [
        (20.0, 0.0, 6.0, "other programs used 1.4 of 2 cores"),  # busy neighbours
        (18.0, 4.0, 18.0, "other programs used 0.0 of 2 cores, other virtual machines 0.4"),  # steal alone
        (13.0, 1.2, 12.0, "other programs used 0.1 of 2 cores, other virtual machines 0.1"),  # both, each little
        (19.0, 0.0, 18.5, None),  # idle but for this program
        (0.3, 0.2, 0.1, None),  # idle
        (12.0, 0.0, 12.4, None),  # own time is counted a tick later than the cores'
    ],
    ids=["neighbours", "steal", "both", "own", "idle", "late"],
)
def test_what_was_counted_decides_whether_a_measurement_is_disturbed(
    busy: float, stolen: float, own: float, text: str | None
) -> None:
    load = after(busy, stolen, own)
    assert load is not None and load.others >= 0 and load.is_much == (text is not None)
    note = disturbance([load])
    assert note == (text and f"speeds were measured while {text}: run `llamaclust measure` on an idle machine")


def test_the_worst_of_several_measurements_is_told() -> None:
    loads = [OtherLoad(8, 0.1, 0.0), OtherLoad(8, 2.5, 0.0), OtherLoad(8, 1.0, 1.0)]
    note = disturbance(loads)
    assert note is not None and "2.5 of 8 cores" in note
    assert disturbance(loads[:1]) is None and disturbance([]) is None


def test_a_short_measurement_has_no_load() -> None:
    assert after(5.0, 0.0, 0.0, seconds=0.09) is None


def test_a_machine_without_counters_has_no_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load_module, "_STAT", tmp_path / "absent")
    assert LoadMeter().measure() is None


def test_own_work_is_not_that_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat, core, ticks = tmp_path / "stat", min(os.sched_getaffinity(0)), os.sysconf("SC_CLK_TCK")

    def says(user_s: int, steal_s: int) -> None:
        """Writes counts in clock ticks; the line of all cores and those of other cores do not matter."""
        lines = [f"{name} {user_s * ticks} 0 0 999 0 0 0 {steal_s * ticks} 0 0" for name in ("cpu", f"cpu{core}")]
        stat.write_text("\n".join([*lines, "cpu4095 9999 9 9 9 9 9 9 9 9 9", "intr 1 2 3"]))

    own = os.times()
    monkeypatch.setattr(load_module, "_STAT", stat)
    monkeypatch.setattr(load_module, "perf_counter", iter([10.0, 20.0]).__next__)
    times = iter(
        [own, os.times_result((own.user + 4.0, own.system + 1.0, own.children_user, own.children_system, 0.0))]
    )
    monkeypatch.setattr(os, "times", lambda: next(times))
    says(100, 7)
    meter = LoadMeter()
    says(108, 8)
    load = meter.measure()
    assert load is not None and (load.others, load.stolen) == pytest.approx((0.3, 0.1))


@pytest.mark.parametrize("depth", [1, 2])
def test_work_of_processes_below_this_one_is_its_own(depth: int) -> None:
    """The processes still run when the load is read, after half a second of processor time."""
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint('done', flush=True)\ninput()"
    nested = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    before = load_module._read()
    command = [sys.executable, "-c", burn if depth == 1 else nested]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"done\n"
        during = load_module._read()
        process.communicate(b"\n", timeout=60)
    after_end = load_module._read()
    assert before is not None and during is not None and after_end is not None
    assert before.own + 0.4 < during.own <= after_end.own


def test_loads_are_kept_beside_their_profiles(tmp_path: Path) -> None:
    first, second = Profile(DeviceProfile(1e9, 2e9)), Profile(DeviceProfile(3e9, 4e9))
    busy = OtherLoad(2, 1.5, 0.1)
    write_profiles(tmp_path, {"a": first, "b": first}, busy)
    write_profiles(tmp_path, {"c": second})
    assert read_other_loads(tmp_path) == {"a": busy, "b": busy}
    write_profiles(tmp_path, {"a": second})
    assert read_other_loads(tmp_path) == {"b": busy}, "another measurement, another load"
    assert read_profiles(tmp_path) == {"a": second, "b": first, "c": second}


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    first, busy = Profile(DeviceProfile(1.0, 2.0)), OtherLoad(2, 1.5, 0.0)
    write_profiles(tmp_path, {"a": first}, busy)
    file = tmp_path / ".profiles.json"
    file.write_text(file.read_text().replace('"read_bytes_s"', '"read_bytes"'))
    assert not read_profiles(tmp_path)
    write_profiles(tmp_path, {"b": first})
    assert read_profiles(tmp_path) == {"b": first} and read_other_loads(tmp_path) == {}
