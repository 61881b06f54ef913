"""Tests of real worker processes: the results of a single process, losses that name the worker, and rejections with a
reason."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.control.failures import failure_attribution
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.membership import members
from llamaclust.cluster.membership.worker_handle import WorkerState
from llamaclust.cluster.membership.worker_requests import profile_worker
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError, ModelFileError, UsageError, WorkerError
from llamaclust.core.limits import NUMERICS_VERSION
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.control.codec import decode_coordinator_message, encode_worker_message
from llamaclust.wire.control.messages import (
    Deadlines,
    Load,
    Register,
    Rejected,
)
from llamaclust.wire.control.profiles import ProfileWorker
from llamaclust.wire.microbatch.messages import Result
from llamaclust.wire.rpc.client import Peer, StreamBrokenError
from llamaclust.wire.rpc.methods import JOIN
from llamaclust.wire.security.token import ClusterToken
from llamaclust.worker.stage.stage_runner import StageRunner
from support.clusters.real_cluster import LIMITS, NAMES, RealCluster, losses, microbatches, real_cluster, running
from support.models.tiny_model import build_tiny_model

REGISTER = Register("x", 1, "host", "unix:/absent.sock", "cpu", 1, "generic", 1, 1, "nothing")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", layers=5, context=512)


async def _run(pipeline: RemotePipeline, model: Path, steps: int = 8) -> list[Result]:
    work = microbatches(Model.open(model).model_id, pipeline.epoch, steps)
    async with running(pipeline) as at_work:
        for microbatch, inputs in work:
            pipeline.submit(ScheduledMicrobatch(microbatch, inputs))
        return [await at_work.next_result() for _ in work]


def _alone(model: Path, epoch: int, steps: int = 8) -> list[object]:
    opened = Model.open(model)
    runner = StageRunner(CpuBackend(1), opened, 0, opened.layer_count, LIMITS)
    work = microbatches(opened.model_id, epoch, steps)
    return [runner.finish(runner.run(microbatch, None), inputs) for microbatch, inputs in work]


@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 5), (0, 1, 4, 5)], ids=str)
def test_processes_give_the_bits_of_one_stage_in_this_process(
    model: Path, tmp_path: Path, cuts: tuple[int, ...]
) -> None:
    async def run() -> list[Result]:
        async with real_cluster(tmp_path, len(cuts) - 1) as cluster:
            pipeline = await cluster.load(model, cuts)
            assert [(stage.worker, stage.start, stage.end) for stage in pipeline.stages] == [
                (name, start, end) for name, start, end in zip(NAMES, cuts, cuts[1:], strict=False)
            ]
            return await _run(pipeline, model)

    results = asyncio.run(run())
    assert [result.failure for result in results] == [None] * len(results)
    assert [result.rows for result in results] == _alone(model, 1)


async def test_two_epochs_live_side_by_side_and_memory_is_given_back(model: Path, tmp_path: Path) -> None:
    async with real_cluster(tmp_path, 2) as cluster:
        old = await cluster.load(model, (0, 2, 5), epoch=1)
        new = await cluster.load(model, (0, 4, 5), epoch=2)
        rows_old, rows_new = await asyncio.gather(_run(old, model), _run(new, model))
        assert [result.rows for result in rows_old] == [result.rows for result in rows_new]
        worker = cluster.registry.workers["a"]
        assert worker.layers == (0, 4)
        both = worker.held_bytes
        await worker.unload(1)
        assert 0 < worker.held_bytes < both
        assert list(worker.stages) == [2]
        order, _ = worker.stages[2]
        await worker.load(replace(order, epoch=3))
        assert sorted(worker.stages) == [2, 3]


@pytest.mark.parametrize("victim", ["a", "b", "c"])
def test_a_killed_worker_is_an_error_that_names_it(
    model: Path, tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry's reports about the worker's process may be late."""
    monkeypatch.setattr(members, "_EXIT_REPORT_S", 20.0)
    monkeypatch.setattr(failure_attribution, "_ATTRIBUTION_S", 20.0)
    lost: list[str] = []

    async def run() -> None:
        nonlocal lost
        quiet: dict[str, Any] = {
            "heartbeat_timeout_s": 60.0,
            "deadlines": Deadlines(heartbeat_s=60.0),
        }  # no heartbeat sent before its end
        async with real_cluster(tmp_path, 3, **quiet) as cluster:
            lost = losses(cluster.registry)
            pipeline = await cluster.load(model, (0, 2, 3, 5))
            async with running(pipeline) as at_work:
                pipeline.submit(ScheduledMicrobatch(*microbatches(Model.open(model).model_id, 1, 1)[0]))
                await at_work.next_result()
                os.kill(cluster.pids[victim], signal.SIGKILL)
                with pytest.raises(WorkerError) as caught:
                    await at_work.next_result()
            start, end = {"a": (0, 2), "b": (2, 3), "c": (3, 5)}[victim]
            assert f"[{start}, {end})" in str(caught.value)  # on a busy machine, a broken stream may be detected first
            async with asyncio.timeout(60):
                await cluster.registry.workers[victim].lost.wait()
            error = str(cluster.registry.workers[victim].error)
            assert f"worker {victim} (layers [{start}, {end})) is lost: its process was killed by signal 9" in error
            assert error.endswith("; its log has no recent error")
            states = {name: worker.state for name, worker in cluster.registry.workers.items()}
            assert states == {
                name: WorkerState.LOST if name == victim else WorkerState.READY for name in ("a", "b", "c")
            }

    asyncio.run(run())
    assert lost == [victim]


async def test_a_silent_worker_is_lost_after_the_timeout(model: Path, tmp_path: Path) -> None:
    async with real_cluster(tmp_path, 2, heartbeat_timeout_s=4.0, deadlines=Deadlines(heartbeat_s=0.1)) as cluster:
        pipeline = await cluster.load(model, (0, 2, 5))
        pid = cluster.pids["b"]
        os.kill(pid, signal.SIGSTOP)
        try:
            async with running(pipeline) as at_work:
                with pytest.raises(WorkerError, match=r"worker b .* is lost: no heartbeat for 4 s"):
                    await at_work.next_result()
        finally:
            os.kill(pid, signal.SIGCONT)


async def test_a_coordinator_that_was_busy_hears_the_heartbeats_that_waited(tmp_path: Path) -> None:
    async with real_cluster(tmp_path, 2, heartbeat_timeout_s=2.5, deadlines=Deadlines(heartbeat_s=0.1)) as cluster:
        await asyncio.sleep(0.2)
        for _ in range(2):
            time.sleep(3.0)  # noqa: ASYNC251  the loop stands still
            await asyncio.sleep(0.2)
        assert {worker.state for worker in cluster.registry.workers.values()} == {WorkerState.JOINED}


def _order(cluster: RealCluster, model: Path, **changes: object) -> Load:
    limits = replace(LIMITS)
    return replace(Load(1, str(model), Model.open(model).model_id, 0, 5, limits, None), **changes)  # type: ignore[arg-type]


BAD_ORDERS: dict[str, tuple[dict[str, object], type[LlamaclustError], str]] = {
    "another model": ({"model_id": "00"}, ModelFileError, "worker a: .*changed or replaced"),
    "no file": ({"model_path": "/absent.gguf"}, ModelFileError, "worker a: /absent.gguf: no such file"),
    "no such layers": ({"end": 6}, UsageError, r"worker a: layers \[0, 6\) do not exist: the model has 5"),
    "memory": (
        {"limits": replace(LIMITS, kv_blocks=1 << 26)},
        InsufficientMemoryError,
        r"worker a: layers \[0, 5\) need \d+ MiB .* MiB are missing",
    ),
}


@pytest.mark.parametrize("name", BAD_ORDERS)
async def test_a_load_that_fails_leaves_a_worker_that_serves(model: Path, tmp_path: Path, name: str) -> None:
    changes, kind, message = BAD_ORDERS[name]

    async with real_cluster(tmp_path, 1) as cluster:
        worker = cluster.registry.workers["a"]
        with pytest.raises(kind, match=message):
            await worker.load(_order(cluster, model, **changes))
        assert (worker.state, worker.layers) == (WorkerState.JOINED, None)
        pipeline = await cluster.load(model, (0, 5), epoch=2)
        await _run(pipeline, model, 3)
        await pipeline.close()


async def test_a_worker_measures_its_machine_and_shows_signs_of_life(model: Path, tmp_path: Path) -> None:
    async with real_cluster(tmp_path, 1) as cluster:
        worker = cluster.registry.workers["a"]
        measured = await profile_worker(worker, ProfileWorker(quant_types=(QuantType.Q8_0,)))
        assert {time.quant_type for time in measured.cpu.products} == {QuantType.Q8_0}
        assert measured.cpu.read_bytes_s > 1e8
        assert measured.cpu.int8_macs_s > 1e8
        pipeline = await cluster.load(model, (0, 5))
        await _run(pipeline, model)
        async with asyncio.timeout(60):
            while worker.heartbeat is None or worker.heartbeat.microbatches < 8:  # noqa: ASYNC110  only values come
                await asyncio.sleep(0.05)
        assert 0 < worker.heartbeat.busy <= 1
        assert worker.heartbeat.tokens == 16 * 4 + 2 * 6
        assert worker.heartbeat.resident_bytes > 1 << 20
        await pipeline.close()


async def _say_hello(cluster: RealCluster, register: Register) -> object:
    peer = Peer(cluster.registry.address, cluster.run.token)
    stream = peer.open(JOIN)
    await stream.write(encode_worker_message(register))
    data = await stream.read()
    await peer.close()
    return None if data is None else decode_coordinator_message(data)


OTHER_VERSION = PROTOCOL_VERSION + 1
REFUSED: dict[str, tuple[Callable[[Register], Register], str]] = {
    "protocol": (
        lambda register: replace(register, protocol_version=OTHER_VERSION),
        f"worker x speaks protocol {OTHER_VERSION}, this coordinator {PROTOCOL_VERSION}:",
    ),
    "numerics": (  # version 1 has neither q8_0 KV nor sliding windows
        lambda register: replace(register, numerics_version=1),
        f"worker x computes by numerics_version 1, this cluster needs {NUMERICS_VERSION}",
    ),
    "reference": (
        lambda register: replace(register, device="reference", numerics_version=0),
        f"worker x computes by numerics_version 0, this cluster needs {NUMERICS_VERSION}",
    ),
    "name": (lambda register: replace(register, name="a"), "a worker named a is a member already"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_workers_that_do_not_fit_are_refused_by_name(tmp_path: Path, what: str) -> None:
    change, reason = REFUSED[what]

    async with real_cluster(tmp_path, 1) as cluster:
        answer = await _say_hello(cluster, change(REGISTER))
        assert isinstance(answer, Rejected)
        assert answer.reason.startswith(reason)
        assert "x" not in cluster.registry.workers


async def test_a_member_needs_the_token_and_must_register(tmp_path: Path) -> None:
    async with real_cluster(tmp_path, 1) as cluster:
        with pytest.raises(StreamBrokenError, match="token"):
            await Peer(cluster.registry.address, ClusterToken("w" * 40)).open(JOIN).opened()
        worker_address = cluster.registry.workers["a"].registration.address
        with pytest.raises(StreamBrokenError, match="token"):
            await Peer(worker_address, ClusterToken("w" * 40)).open("/llamaclust.v1.Stage/Forward").opened()
        stream = Peer(cluster.registry.address, cluster.run.token).open(JOIN)
        await stream.write(b"\xff\xff")
        with pytest.raises(StreamBrokenError, match="damaged"):
            await stream.read()
        assert cluster.registry.workers["a"].state is WorkerState.JOINED


async def test_a_worker_that_does_not_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(
        WorkerError, match=r"worker a did not start: .* exit code 2; its last error: .*device 'toaster'"
    ):
        async with real_cluster(tmp_path, 1, device="toaster"):
            pass


async def test_workers_on_the_reference_are_a_cluster_among_themselves(tmp_path: Path) -> None:
    async with real_cluster(tmp_path, 2, device="reference") as cluster:
        assert {worker.registration.numerics_version for worker in cluster.registry.workers.values()} == {0}
        answer = await _say_hello(cluster, REGISTER)
        assert isinstance(answer, Rejected) and answer.reason.startswith(
            f"worker x computes by numerics_version {NUMERICS_VERSION},"
        )
