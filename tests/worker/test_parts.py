"""Tests of small parts of a worker: threads of jobs, waiting inputs, settings, and machine information."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from llamaclust.core.errors import DeadlineError, DeviceLostError, InsufficientMemoryError, ProtocolError, UsageError
from llamaclust.core.logs import LogFormat
from llamaclust.wire.control.messages import (
    Deadlines,
    Failure,
    Loaded,
    LoadFailed,
    LoadProgress,
    Unload,
    Unloaded,
    UnloadFailed,
    WorkerMessage,
)
from llamaclust.wire.microbatch.codec import MAX_STAGES
from llamaclust.wire.microbatch.inputs import encode_inputs
from llamaclust.wire.microbatch.messages import SamplingInputs
from llamaclust.worker import loads
from llamaclust.worker import session as session_module
from llamaclust.worker.devices import nvidia, system_info
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.nvidia import advice
from llamaclust.worker.loads import Loads
from llamaclust.worker.service import StageService
from llamaclust.worker.session import Session
from llamaclust.worker.settings import WorkerSettings
from llamaclust.worker.stage.compute import INLINE_NS, Compute, step_limit_s
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.stage.dependencies import Dependencies
from llamaclust.worker.stage.step_inputs import StepInputs
from llamaclust.worker.weights import load
from llamaclust.worker.weights.weights import Progress
from llamaclust.worker.worker import Worker


async def test_short_jobs_run_on_the_event_loop_and_long_ones_beside_it() -> None:
    compute = Compute()
    here = threading.get_ident()
    assert await compute.run(threading.get_ident, expected_ns=INLINE_NS - 1) == here
    assert await compute.run(threading.get_ident, expected_ns=INLINE_NS) != here
    assert await compute.run(threading.get_ident) != here
    for expected_ns in (0, INLINE_NS):
        with pytest.raises(ZeroDivisionError):
            await compute.run(lambda: 1 // 0, expected_ns=expected_ns)
    compute.close()


async def test_jobs_never_overlap_not_even_after_a_cancelled_one() -> None:
    compute, begun, go_on = Compute(), threading.Event(), threading.Event()

    def long_job() -> None:
        begun.set()
        go_on.wait(10)

    cancelled = asyncio.create_task(compute.run(long_job))
    await asyncio.to_thread(begun.wait, 10)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    after = asyncio.create_task(compute.run(threading.get_ident, expected_ns=0))
    await asyncio.sleep(0.01)
    assert not after.done()
    go_on.set()
    assert await after != threading.get_ident()  # it waited in the queue
    assert await compute.run(threading.get_ident, expected_ns=0) == threading.get_ident()
    compute.close()


async def test_a_job_that_does_not_end_is_known_and_ends_the_process() -> None:
    compute, begun, go_on = Compute(), threading.Event(), threading.Event()
    await compute.idle(5.0)
    assert compute.computing_s == 0.0

    def long_job() -> None:
        begun.set()
        go_on.wait(10)

    hanging = asyncio.create_task(compute.run(long_job))
    await asyncio.to_thread(begun.wait, 10)
    before_s = compute.computing_s
    with pytest.raises(DeviceLostError, match="does not end, so this worker process ends"):
        await compute.idle(0.05)
    assert compute.computing_s >= before_s + 0.04
    go_on.set()
    await hanging
    await compute.idle(5.0)
    assert compute.computing_s == 0.0
    compute.close()


async def test_a_step_far_beyond_its_usual_time_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps without a limit do not end the process, nor do steps that wait behind them."""
    monkeypatch.setattr("llamaclust.worker.stage.compute._WATCH_S", 0.005)
    compute, go_on = Compute(), threading.Event()
    unlimited = compute.queue(lambda: go_on.wait(0.1))
    hanging = compute.queue(lambda: go_on.wait(10), limit_s=0.05)
    with pytest.raises(DeviceLostError, match=r"the GPU hangs: a step has run for \d+ s, but the limit is 0 s"):
        await compute.run_until_device_lost(asyncio.sleep(10))
    assert unlimited.done() and not hanging.done()
    go_on.set()
    await hanging
    assert await compute.run(lambda: 1, limit_s=0.0) == 1  # completed jobs are not checked
    compute.close()


async def test_a_short_step_with_a_limit_that_hangs_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without a limit would run on the event loop."""
    monkeypatch.setattr("llamaclust.worker.stage.compute._WATCH_S", 0.005)
    compute, go_on = Compute(), threading.Event()
    with pytest.raises(DeviceLostError, match="the GPU hangs"):
        await compute.run_until_device_lost(compute.run(lambda: go_on.wait(5), expected_ns=0, limit_s=0.05))
    go_on.set()
    await compute.idle(5.0)
    compute.close()


def test_what_a_step_may_take() -> None:
    assert step_limit_s(500_000_000, on_gpus=True) == 40.0
    assert step_limit_s(None, on_gpus=True) == inf  # kernels are compiled
    assert step_limit_s(500_000_000, on_gpus=False) == inf  # weights may come from disk


async def test_inputs_wait_or_are_waited_for_and_late_ones_are_dropped() -> None:
    dependencies = Dependencies(epoch=1, inputs_s=0.05)
    inputs = [StepInputs.read(encode_inputs(SamplingInputs(1, number, ()))) for number in range(600)]
    dependencies.put_inputs(inputs[0])
    assert await dependencies.inputs(0) is inputs[0]
    dependencies.done(0)
    taking = asyncio.create_task(dependencies.inputs(1))
    await asyncio.sleep(0)
    dependencies.put_inputs(inputs[1])
    assert await taking is inputs[1]
    dependencies.done(1)
    with pytest.raises(DeadlineError, match="sampling inputs of microbatch 2"):
        await dependencies.inputs(2)
    dependencies.done(2)
    dependencies.put_inputs(inputs[2])
    with pytest.raises(DeadlineError, match="sampling inputs of microbatch 2"):
        await dependencies.inputs(2)
    with pytest.raises(ProtocolError, match=r"expected 3 of epoch 0\.1, found 5 of epoch 0\.1"):
        dependencies.put_inputs(inputs[5])
    most = 2 * MAX_STAGES + 4  # the scheduler's in_flight, and lookahead
    for number in range(3, 3 + most):
        dependencies.put_inputs(inputs[number])
    with pytest.raises(ProtocolError, match=f"more than {most} "):
        dependencies.put_inputs(inputs[3 + most])


def test_settings_survive_the_pipe_to_a_worker() -> None:
    kinds = {str: "x", int: 7, float: 0.5, bool: True, Path: Path("/p"), LogFormat: LogFormat.JSON}
    hints = get_type_hints(WorkerSettings)
    values: dict[str, Any] = {name: kinds[(get_args(hint) or (hint,))[0]] for name, hint in hints.items()}
    values["standbys"] = ("x", "y")
    full, least = WorkerSettings(**values), WorkerSettings(name="a")
    assert [WorkerSettings.from_json(settings.to_json()) for settings in (full, least)] == [full, least]
    assert "secret" not in repr(replace(full, token="secret"))


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    settings = WorkerSettings(name="a", device="cuda:999")
    with pytest.raises(UsageError, match="device cuda"):
        Device.open(settings)
    with pytest.raises(UsageError, match="device 'toaster'"):
        Device.open(replace(settings, device="toaster"))
    with pytest.raises(UsageError, match="feature level 'sse9'"):
        Device.open(WorkerSettings(name="a", feature_level="sse9", threads=1))


def test_what_hides_a_gpu_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dev, driver = tmp_path / "dev", tmp_path / "proc/driver/nvidia"
    assert "install NVIDIA's driver so that nvidia-smi lists the GPU; start a container with --gpus all" in advice(
        tmp_path
    )
    driver.mkdir(parents=True)
    (driver / "version").touch()
    known = advice(tmp_path)
    assert (
        "driver is loaded, but this process has no" in known and "DeviceAllow=char-nvidia* rw, without Private" in known
    )
    assert "runtimeClassName" in known and "\n" not in known
    dev.mkdir()
    (dev / "nvidiactl").touch()
    assert "`sudo nvidia-modprobe -u -c 0` creates it" in advice(tmp_path)
    (dev / "nvidia-uvm").touch()
    assert advice(tmp_path) == ""
    (dev / "nvidia-uvm").unlink()
    (dev / "nvidia-uvm").mkdir()  # like a file that may not be opened, even by root
    assert "nvidia-uvm: Is a directory: add this user to the file's group (often video)" in advice(tmp_path)
    (dev / "dxg").touch()
    assert advice(tmp_path) == "", "of Windows"
    monkeypatch.setattr(nvidia, "advice", lambda: "do this")
    with pytest.raises(UsageError, match=r"device cuda.*; do this$"):
        Device.open(WorkerSettings(name="a", device="cuda:999"))


def test_a_cap_on_memory_counts_what_the_process_has() -> None:
    most = system_info.resident_bytes() + (1 << 28)
    capped = Device.open(WorkerSettings(name="a", device="reference", memory_bytes=most))
    assert 0 < capped.free_memory_bytes < 1 << 29
    assert Device.open(WorkerSettings(name="a", device="reference", memory_bytes=1)).free_memory_bytes == 0


def test_memory_that_was_freed_is_returned_to_the_system() -> None:
    """The blocks are smaller than glibc's mmap threshold, one remains after the others, and only a cycle refers to the
    rest."""
    system_info.release_freed_memory()  # memory of earlier tests
    before = system_info.resident_bytes()
    blocks: list[object] = [np.ones(1 << 16, np.uint8) for _ in range(1 << 10)]
    assert system_info.resident_bytes() - before > 50 << 20
    last, blocks[-1] = blocks[-1], blocks
    del blocks
    system_info.release_freed_memory()
    assert system_info.resident_bytes() - before < 8 << 20
    del last


def test_the_machine_is_known() -> None:
    assert 0 < system_info.resident_bytes() < system_info.total_memory_bytes()
    assert 0 < system_info.available_memory_bytes() <= system_info.total_memory_bytes()
    assert system_info.processor_name()


def test_a_device_that_is_lost_ends_the_workers_life() -> None:
    async def run(at_once: bool) -> str:
        compute = Compute()
        waits = asyncio.Event()

        async def life() -> str:
            if not at_once:
                await waits.wait()
            return "told so"

        try:
            living = asyncio.create_task(compute.run_until_device_lost(life()))
            await asyncio.sleep(0)
            if not at_once:
                threading.Thread(target=compute.give_up, args=(DeviceLostError("cuda:0 is lost"),)).start()
            return await asyncio.wait_for(living, 10)
        finally:
            compute.close()

    assert asyncio.run(run(at_once=True)) == "told so"
    with pytest.raises(DeviceLostError, match="cuda:0 is lost"):
        asyncio.run(run(at_once=False))


class _Layers:
    """Layers that were loaded before the failure."""


def test_a_load_that_failed_holds_nothing_when_the_coordinator_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[_Layers]] = []
    told: list[tuple[WorkerMessage, _Layers | None]] = []

    async def fails(*_: object) -> None:
        layers = _Layers()
        loaded.append(weakref.ref(layers))
        raise InsufficientMemoryError("no room for the next one")

    async def say(message: WorkerMessage) -> None:
        told.append((message, loaded[0]()))

    monkeypatch.setattr(load, "_load", fails)
    monkeypatch.setattr(session_module, "_log", logging.getLogger("not kept"))
    logging.getLogger("not kept").propagate = False
    nothing: Any = None
    weights: Any = SimpleNamespace(received_bytes=0)
    worker = Worker("a", nothing, StageService("a"), nothing, weights, nothing)
    session = Session(worker, nothing, Deadlines(), Counters(), say)
    limits = SimpleNamespace(expert_shards=1)
    fields = {"epoch": 1, "model_path": "m.gguf", "model_id": "m", "start": 0, "end": 2, "encoder": None}
    order: Any = SimpleNamespace(**fields, exclusive=True, limits=limits, group=None)
    gc.disable()
    try:
        asyncio.run(loads.Loads(session).load(order))
    finally:
        gc.enable()
    (message, layers), *more = told
    assert isinstance(message, LoadFailed) and layers is None and not more


@pytest.mark.parametrize("lost", [False, True])
async def test_an_unload_that_fails_is_answered_or_ends_the_process_of_a_lost_device(lost: bool) -> None:
    answers: list[WorkerMessage] = []
    given_up: list[DeviceLostError] = []
    error = DeviceLostError("cuda:0 is lost") if lost else InsufficientMemoryError("no room")

    async def remove(epoch: int) -> None:
        raise error

    async def send(message: WorkerMessage) -> None:
        answers.append(message)

    nothing: Any = None
    compute: Any = SimpleNamespace(give_up=given_up.append)
    service: Any = SimpleNamespace(remove=remove)
    session = Session(Worker("a", nothing, service, compute, nothing, nothing), nothing, Deadlines(), Counters(), send)
    await loads.Loads(session).unload(Unload(3))
    assert given_up == ([error] if lost else [])
    assert answers == ([] if lost else [UnloadFailed(3, Failure("InsufficientMemoryError", "no room"))])


@pytest.mark.parametrize("is_orphan", [False, True], ids=["unloaded", "its membership ends"])
async def test_a_load_that_is_not_needed_ends_soon(monkeypatch: pytest.MonkeyPatch, is_orphan: bool) -> None:
    """The load would take 50 s; the next load does not wait for it."""
    answers: list[WorkerMessage] = []
    begun, at_work = threading.Event(), threading.Lock()

    def runner(order: Any, progress: Progress) -> object:
        with at_work:
            begun.set()
            for _ in range(order.seconds * 100):
                progress.add(1)
                time.sleep(0.01)
        return SimpleNamespace(memory=SimpleNamespace(weight_bytes=1, kv_bytes=2, workspace_bytes=3), samples=False)

    async def send(message: WorkerMessage) -> None:
        answers.append(message)

    async def in_thread(order: Any, device: object, files: Any, reserved_bytes: int) -> object:
        return await files.progress.in_thread(partial(runner, order, files.progress))

    monkeypatch.setattr(load, "_load", in_thread)
    monkeypatch.setattr(loads, "StageStreams", lambda epoch, *_: SimpleNamespace(epoch=epoch))
    anything: Any = SimpleNamespace(received_bytes=0)
    worker = Worker("a", anything, StageService("a"), anything, anything)
    fields = {"start": 0, "end": 2, "exclusive": False, "devices": (), "next_address": None, "first_address": None}
    limits = SimpleNamespace(expert_shards=1, wide_tiles=False)
    fields |= {"previous_worker": None, "last_worker": None, "limits": limits, "group": None}
    fields |= {"model_path": "m.gguf", "model_id": "m", "encoder": None}
    orders: Any = (SimpleNamespace(epoch=epoch, seconds=seconds, **fields) for epoch, seconds in ((1, 50), (2, 0)))
    long, short = orders
    members = [Loads(Session(worker, anything, Deadlines(), Counters(), send)) for _ in range(2)]
    async with asyncio.timeout(60):
        loading = asyncio.create_task(members[0].load(long))
        await asyncio.to_thread(begun.wait, 10)
        if is_orphan:
            loading.cancel()
        else:
            await members[0].unload(Unload(1))
            await loading
        await members[is_orphan].load(short)
    given = [message for message in answers if not isinstance(message, LoadProgress)]
    cancelled = [LoadFailed(1, Failure("LoadCancelledError", "the load was cancelled")), Unloaded(1)]
    assert sorted(map(str, given)) == sorted(map(str, [*([] if is_orphan else cancelled), Loaded(2, 1, 2, 3)]))
    assert not at_work.locked()
