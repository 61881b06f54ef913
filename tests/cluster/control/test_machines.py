"""Checks that workers share a machine by its boot id, not by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llamaclust.cluster.control.resources.profiling import _key
from llamaclust.cluster.control.resources.resource_shares import WorkerResources, machine_shares
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.wire.control.messages import CoordinatorMessage, Register
from llamaclust.wire.security.credentials import Insecure
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.settings import WorkerSettings
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
