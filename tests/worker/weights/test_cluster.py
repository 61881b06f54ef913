"""Tests of clusters with workers that lack the model file: each fetches its own layers from the worker that has the
file, and nothing twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from llamaclust.cluster.control.epochs import load_stages, unload_stages
from llamaclust.cluster.control.load_orders import StageLoads
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.control.weight_sources import ModelReference
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import find_weights
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.core.errors import LlamaclustError, ModelFileError
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.wire.control.weights import FindWeights
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs
from llamaclust.worker.stage.stage_runner import StageRunner
from support.clusters.command_line import eventually
from support.clusters.real_cluster import LIMITS, running
from support.clusters.served import until
from support.file_members import NOWHERE, Members, alone, members, results
from support.models.tiny_adapter import build_adapter
from support.models.tiny_model import build_tiny_model

FOUR = ("b", "c", "d", "e")
CUTS = (0, 1, 3, 4, 6)


@pytest.fixture(scope="module", params=["untied", "tied, with frequency factors"])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    tied = request.param != "untied"
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    return build_tiny_model(path, hidden=512, ffn=1024, layers=6, tied=tied, rope_factors=tied)


def own_bytes(model: Path, start: int, end: int) -> int:
    """Returns the bytes of the layers' tensors in the file, counting identical tensors once."""
    opened = Model.open(model)
    names = {*opened.program(start, end).weights, "rope_freqs.weight"} & set(opened.file.tensors)
    return sum(opened.file.tensor(name).n_bytes for name in names)


async def test_four_workers_get_their_own_layers_from_one_and_a_second_start_gets_nothing(
    model: Path, tmp_path: Path
) -> None:
    whole = alone(model)

    async def start(first: bool) -> None:
        async with members(tmp_path / "run") as cluster:
            lives = [cluster.start("a", model_dir=model.parent), *map(cluster.start, FOUR)]
            await cluster.registry.wait_for(("a", *FOUR), 20)
            begun_s = time.monotonic()
            handles = await cluster.load(model, FOUR, CUTS)
            took_s = time.monotonic() - begun_s
            loaded = [handle.stages[1][1] for handle in handles]
            orders = [handle.stages[1][0] for handle in handles]
            assert all(order.weights is not None and order.weights.sources[0].worker == "a" for order in orders)
            manifest_bytes = orders[0].weights.manifest_bytes if orders[0].weights else 0
            due = [own_bytes(model, *cut) + manifest_bytes for cut in pairwise(CUTS)]
            assert [answer.fetched_bytes for answer in loaded] == (due if first else [0, 0, 0, 0])
            assert max(due) < sum(due) / 2
            assert await results(cluster, handles, model) == whole
            received = {name: answer.fetched_bytes for name, answer in zip(FOUR, loaded, strict=True)}
            await until(lambda: moved(cluster) == (sum(due) * first, {"a": 0, **received}))
            print(f"{'first' if first else 'second'} load: {took_s:.3f} s, {sum(due)} bytes")
            await asyncio.to_thread(_wait_for_layers, tmp_path / "run", 4)
        await asyncio.gather(*lives, return_exceptions=True)

    async with asyncio.timeout(100):
        await start(first=True)
        await start(first=False)


async def test_adapters_are_fetched_as_layers_are(model: Path, tmp_path: Path) -> None:
    adapter = build_adapter(tmp_path / "a.gguf", model)
    (tmp_path / model.name).symlink_to(model)
    opened = Model.open(model, adapters=[adapter])
    chunks = (Chunk((5, 6, 7), 0, (0, 1), 2, adapters=((0, 0.5),)), Chunk((5, 6, 7), 0, (1, 1), 1))
    tasks = tuple(SampleTask(SamplingParams(), 1, 0, position) for position in (2, 3, 3))
    work = Microbatch(opened.model_id, 1, 0, chunks), SamplingInputs(1, 0, tasks)
    runner = StageRunner(CpuBackend(1), opened, 0, opened.layer_count, LIMITS)
    whole = runner.finish(runner.run(work[0], None), work[1])
    assert whole[1].logprob != whole[2].logprob
    async with asyncio.timeout(60), members(tmp_path / "run") as cluster:
        lives = [cluster.start("a", model_dir=tmp_path), cluster.start("b")]
        await cluster.registry.wait_for(("a", "b"), 20)
        handles = await cluster.load(model, "ab", (0, 3, 6), adapters=[adapter])
        answer = handles[1].stages[1][1]
        names = opened.program(3, 6).weights
        assert answer.fetched_bytes > sum(opened.file.tensor(name).n_bytes for name in names)
        pipeline = await RemotePipeline.open(1, handles, cluster.run.token)
        async with running(pipeline) as at_work:
            pipeline.submit(ScheduledMicrobatch(*work))
            assert (await at_work.next_result()).rows == whole
    await asyncio.gather(*lives, return_exceptions=True)


def moved(cluster: Members) -> tuple[int, dict[str, int]]:
    """Returns the bytes of weights sent, and those that each worker received, according to heartbeats."""
    beats = {name: worker.heartbeat for name, worker in cluster.registry.workers.items()}
    told = {name: beat for name, beat in beats.items() if beat is not None}
    sent = sum(beat.weight_bytes_sent for beat in told.values())
    return sent, {name: beat.weight_bytes_received for name, beat in told.items()}


def _wait_for_layers(folder: Path, workers: int, layers: int = 4) -> None:
    """Waits until the packed-weight cache holds this many layers of this many workers."""

    def within() -> bool:
        found = list(folder.glob("*/packed/*.tiles"))
        return len(found) >= layers and len({path.parent for path in found}) == workers

    eventually(within, 60, "packed layers")


async def test_a_second_start_of_the_demo_model_fetches_nothing(demo_model: Path, tmp_path: Path) -> None:
    async def start() -> tuple[float, int]:
        async with members(tmp_path / "run") as cluster:
            lives = [cluster.start("a", model_dir=demo_model.parent), *map(cluster.start, "bcd")]
            await cluster.registry.wait_for("abcd", 20)
            begun_s = time.monotonic()
            handles = await cluster.load(demo_model, "bcd", (0, 10, 20, 30), f"/nowhere/{demo_model.name}")
            took_s = time.monotonic() - begun_s
            await asyncio.to_thread(_wait_for_layers, tmp_path / "run", 3, 30)
        await asyncio.gather(*lives, return_exceptions=True)
        return took_s, sum(handle.stages[1][1].fetched_bytes for handle in handles)

    async with asyncio.timeout(100):
        first, second = await start(), await start()
        print(f"first load {first[0]:.2f} s, {first[1]} bytes; second {second[0]:.3f} s, {second[1]} bytes")
        assert first[1] > 50_000_000 and second[1] == 0


async def test_two_workers_of_one_host_share_a_cache(model: Path, tmp_path: Path) -> None:
    async with asyncio.timeout(100), members(tmp_path / "run") as cluster:
        names = ("b", "c")
        lives = [
            cluster.start("a", model_dir=model.parent),
            *(cluster.start(name, cache="shared") for name in names),
        ]
        await cluster.registry.wait_for(("a", *names), 20)
        stages = [[StageInfo(name, 0, 6)] for name in names]
        model_id = Model.open(model).model_id
        workers = cluster.registry.workers
        for name in names:  # so that both requests below arrive at once
            await find_weights(workers[name], FindWeights(NOWHERE, model_id, False))
        loads = [
            load_stages(StageLoads(1, stage, ModelReference(NOWHERE, model_id), LIMITS),
                        {stage[0].worker: workers[stage[0].worker], "a": workers["a"]})
            for stage in stages
        ]  # fmt: skip
        await find_weights(workers["a"], FindWeights(NOWHERE, model_id, False))
        await find_weights(workers["a"], FindWeights(NOWHERE, model_id, True))
        handles = [loaded[0] for loaded in await asyncio.gather(*loads)]
        order = handles[0].stages[1][0]
        fetched = [handle.stages[1][1].fetched_bytes for handle in handles]
        assert order.weights is not None
        assert sum(fetched) == own_bytes(model, 0, 6) + order.weights.manifest_bytes
        assert await results(cluster, handles[:1], model) == alone(model)
    await asyncio.gather(*lives, return_exceptions=True)


def test_who_has_fetched_gives_to_others_when_the_file_is_gone(model: Path, tmp_path: Path) -> None:
    async def first() -> None:
        async with asyncio.timeout(100), members(tmp_path / "run") as cluster:
            lives = [cluster.start("a", model_dir=model.parent), cluster.start("b")]
            await cluster.registry.wait_for(("a", "b"), 20)
            await cluster.load(model, ("b",), (0, 6))
        await asyncio.gather(*lives, return_exceptions=True)

    async def then() -> None:
        async with asyncio.timeout(100), members(tmp_path / "run") as cluster:
            lives = [cluster.start("b"), cluster.start("c")]
            await cluster.registry.wait_for(("b", "c"), 20)
            handles = await cluster.load(model, ("c",), (2, 6))
            assert await results_of_end(handles) > 0
            await unload_stages(1, handles)
        await asyncio.gather(*lives, return_exceptions=True)

    async def results_of_end(handles: Sequence[WorkerHandle]) -> int:
        return handles[0].stages[1][1].fetched_bytes

    asyncio.run(first())
    asyncio.run(then())


async def test_without_a_worker_that_has_it_the_error_says_so(model: Path, tmp_path: Path) -> None:
    async with asyncio.timeout(100), members(tmp_path / "run") as cluster:
        lives = [cluster.start("b"), cluster.start("c")]
        await cluster.registry.wait_for(("b", "c"), 20)
        with pytest.raises(ModelFileError, match=r"/nowhere/m.gguf: no such file on this machine, and neither"):
            await cluster.load(model, ("b", "c"), (0, 3, 6))
    await asyncio.gather(*lives, return_exceptions=True)


async def test_a_cache_that_is_too_small_is_one_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(100), members(tmp_path / "run") as cluster:
        lives = [cluster.start("a", model_dir=model.parent)]
        await cluster.registry.wait_for(("a",), 20)
        monkeypatch.setattr("llamaclust.worker.weights.weights.WeightCache", lambda path, _: _small(path))
        lives.append(cluster.start("b"))
        await cluster.registry.wait_for(("b",), 20)
        with pytest.raises(LlamaclustError, match=r"the limit is .* .LLAMACLUST_WEIGHTS_SIZE"):
            await cluster.load(model, ("b",), (0, 6))
    await asyncio.gather(*lives, return_exceptions=True)


def _small(path: Path) -> object:
    from llamaclust.model.weights.cache import WeightCache

    return WeightCache(path, 1 << 20)
