"""Tests of the fault schedule that a seed determines."""

from __future__ import annotations

from collections import Counter

import pytest

from llamaclust.core.errors import UsageError
from llamaclust.tools.chaos.schedule import Fault, FaultKind, Schedule, fault_kinds

WORKERS = ("a", "b", "c")
OF_COORDINATOR = (FaultKind.COORDINATOR_KILL, FaultKind.COORDINATOR_STOP, FaultKind.DISK_FULL)
ALL = dict.fromkeys(FaultKind, WORKERS) | dict.fromkeys(OF_COORDINATOR, ("tiny",))


def faults(seed: int, count: int, every_s: float = 100.0) -> list[Fault | None]:
    schedule = Schedule(seed)
    return [schedule.next_fault(number * every_s, ALL, WORKERS) for number in range(count)]


def test_a_seed_gives_the_same_faults() -> None:
    assert faults(5, 50) == faults(5, 50) != faults(6, 50)
    assert Schedule(5).pause_s() == Schedule(5).pause_s()


def test_every_kind_and_target_comes() -> None:
    seen = Counter((fault.kind, fault.target) for fault in faults(1, 500) if fault)
    assert seen.keys() == {(kind, name) for kind, names in ALL.items() for name in names}


def test_stops_are_shorter_and_longer_than_the_heartbeat_timeout() -> None:
    held_s = [fault.hold_s for fault in faults(1, 500) if fault and fault.kind is FaultKind.STOP]
    assert min(held_s) < 0.2 and sum(seconds > 5 for seconds in held_s) > 10 and max(held_s) <= 10
    assert all(fault.hold_s == 0 for fault in faults(1, 500) if fault and fault.kind is FaultKind.KILL)


def test_kinds_have_names() -> None:
    assert fault_kinds() == frozenset(FaultKind)
    assert fault_kinds("kill, disk-full") == {FaultKind.KILL, FaultKind.DISK_FULL}
    with pytest.raises(UsageError, match="unknown kind 'clock'; choose from kill, stop"):
        fault_kinds("kill,clock")


def test_faults_within_a_worker_leave_another_one_and_end_by_themselves() -> None:
    found = [fault for fault in faults(1, 500) if fault and fault.kind in (FaultKind.FAILS, FaultKind.MUTE)]
    assert {(fault.kind, fault.hold_s) for fault in found} == {(FaultKind.FAILS, 2.0), (FaultKind.MUTE, 6.0)}
    alone = {FaultKind.FAILS: ("a",), FaultKind.MUTE: ("a",)}
    assert Schedule(1).next_fault(0.0, alone, ["a"]) is None


def test_draws_do_not_depend_on_targets() -> None:
    some, none = Schedule(9), Schedule(9)
    some.next_fault(0.0, ALL, WORKERS)
    assert none.next_fault(0.0, {}, ()) is None
    assert some.pause_s() == none.pause_s()


def test_a_worker_keeps_restarts_within_a_minute() -> None:
    """Checks that each worker is lost at most five times; drains and faults of the coordinator continue."""
    found = [fault for fault in faults(2, 400, every_s=0.1) if fault]
    losses = Counter(fault.target for fault in found if fault.kind.is_loss)
    assert losses == dict.fromkeys(WORKERS, 5)
    only = {FaultKind.KILL: ("a",)}
    schedule = Schedule(2)
    assert [schedule.next_fault(0.0, only, ["a"]) is not None for _ in range(6)] == [True] * 5 + [False]
    assert schedule.next_fault(76.0, only, ["a"]) == Fault(FaultKind.KILL, "a")


def test_the_last_worker_is_neither_stopped_nor_drained_nor_cut_off() -> None:
    schedule = Schedule(3)
    found = [schedule.next_fault(100.0 * number, ALL, WORKERS, {"a", "b"}) for number in range(100)]
    assert {(fault.kind, fault.target) for fault in found if fault} == {
        (FaultKind.KILL, "c"),
        (FaultKind.SLOW_LINK, "c"),
        *((kind, "tiny") for kind in OF_COORDINATOR),
    }
    alone = dict.fromkeys((FaultKind.STOP, FaultKind.DRAIN, FaultKind.PARTITION), ("a",))
    assert schedule.next_fault(0.0, alone, ["a"]) is None


@pytest.mark.parametrize("kind", [kind for kind in FaultKind if kind.needs_another_worker])
def test_the_other_worker_may_be_on_another_machine(kind: FaultKind) -> None:
    local = {kind: ("a",)}
    fault = Schedule(4).next_fault(0.0, local, ["a", "b"])
    assert fault is not None and (fault.kind, fault.target) == (kind, "a")
    assert Schedule(4).next_fault(0.0, local, ["a", "b"], {"b"}) is None
