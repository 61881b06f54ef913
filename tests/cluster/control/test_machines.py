"""Tests of machines' memory: workers share it by the machine's boot id, and plans see what other programs free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control.observations import Signal, WorkerLost
from llamaclust.cluster.control.pool.membership_watch import MembershipWatch
from llamaclust.cluster.control.reconcile import FailRequests, LoadEpoch, MakePlan
from llamaclust.cluster.control.resources.profiling import _key
from llamaclust.cluster.control.resources.resource_shares import WorkerResources, machine_shares
from llamaclust.cluster.control.state_store import StateStore
from llamaclust.cluster.membership.members import HeartbeatReceived
from llamaclust.cluster.membership.worker_handle import FreshMemory, WorkerHandle
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.wire.control.messages import CoordinatorMessage, Heartbeat, Register
from llamaclust.wire.security.credentials import Insecure
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.settings import WorkerSettings
from support.plans.observed_cluster import ONLY_A, RECOVERY_S, Cluster
from support.wire.control_messages import REGISTER

_GIB = 1 << 30


async def _nothing(message: CoordinatorMessage) -> None: ...


def _of(name: str, machine: str, group: str = "", host: str = "raspberrypi") -> Register:
    free = replace(REGISTER, free_memory_bytes=8 * _GIB, machine_free_bytes=8 * _GIB)
    return replace(free, name=name, host=host, machine=machine, memory_group=group)


def _shares(*workers: Register) -> list[int]:
    shares = machine_shares(
        {worker.name: WorkerResources.of(WorkerHandle(worker, _nothing, lambda: "", Insecure())) for worker in workers}
    )
    return [shares[worker.name] // _GIB for worker in workers]


def test_machines_with_the_same_name_share_nothing() -> None:
    workers = [_of(name, machine=f"boot {name}") for name in "abc"]
    assert _shares(*workers) == [8, 8, 8], "not 2 each"
    handles = {worker.name: WorkerHandle(worker, _nothing, lambda: "", Insecure()) for worker in workers}
    assert "one of 1 workers" in _key(handles["a"], handles)


def test_pods_of_one_machine_share_what_no_limit_of_their_own_divides() -> None:
    assert _shares(_of("a", "boot", host="pod a"), _of("b", "boot", host="pod b")) == [4, 4]
    assert _shares(_of("a", "boot", "1:7", host="pod a"), _of("b", "boot", "1:8", host="pod b")) == [8, 8]
    assert _shares(_of("a", "boot", "1:7"), _of("b", "boot", "1:7")) == [4, 4]


def test_workers_register_the_boot_id() -> None:
    device = Device.open(WorkerSettings(name="a", device="reference"))
    assert device.registration("a", "h:1", "").machine == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize("is_registered", [True, False], ids=["at the registration", "at a load"])
async def test_memory_that_another_program_frees_ends_a_shortage(is_registered: bool) -> None:
    worker = WorkerHandle(_of("a", "boot"), _nothing, lambda: "", Insecure())
    if is_registered:
        low = {"free_memory_bytes": _GIB, "machine_free_bytes": _GIB}
        worker.registration = replace(worker.registration, **low)  # type: ignore[arg-type]
    else:
        worker.fresh_memory = FreshMemory(_GIB, ())
    short, cluster = InsufficientMemoryError("12 MiB are missing"), Cluster.serving()
    store = StateStore(cluster.state)
    runner: Any = SimpleNamespace(engine=None, open_epochs=(), store=store)
    nothing: Any = None
    watch = MembershipWatch(nothing, nothing, [runner], nothing, nothing, nothing, nothing)

    def changes(free_bytes: int) -> bool:
        worker.receive(Heartbeat(0.0, 0, 0, 1, free_bytes))
        store.state = cluster.state
        watch._changed(HeartbeatReceived(worker))
        return not store.is_current

    assert not changes(4 * _GIB), "no request waits"
    cluster.see(WorkerLost("b"))
    cluster.lose_pipeline()
    cluster.notified(cluster.plan(short))
    assert isinstance(cluster.at(RECOVERY_S), FailRequests)
    assert not changes(_GIB + _GIB // 50), "hardly more than before"
    worker.stages[1] = nothing
    assert not changes(4 * _GIB), "its stage may not have touched all of its memory"
    worker.stages.clear()
    assert changes(4 * _GIB) and await store.next(None) is Signal.MEMORY_FREED
    assert not changes(4 * _GIB), "it is known"
    assert machine_shares({"a": WorkerResources.of(worker)}) == {"a": 4 * _GIB}
    assert cluster.see(Signal.MEMORY_FREED) == MakePlan(cluster.state.inputs)
    assert cluster.plan(ONLY_A) == LoadEpoch(ONLY_A, is_exclusive=True)
