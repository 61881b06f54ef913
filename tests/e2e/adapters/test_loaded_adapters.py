"""Tests of adapters that clients load into a running cluster: answers equal those of a cluster that had the adapters
from the start, and other requests and KV blocks are not affected."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control import epochs
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import set_adapters
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError, ParameterError, WorkerError
from llamaclust.core.limits import MAX_ADAPTER_RANK, AdapterScales
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.model.adapters import read_adapter
from llamaclust.model.quant_types import QuantType
from llamaclust.wire.control.weights import AdapterFile
from support.clusters.recovering import CONTEXT, Answer, config, recovering
from support.models.tiny_adapter import build_adapter
from support.models.tiny_model import build_tiny_model
from support.seed import SEED

_SEEDED = SamplingParams(temperature=0.9, top_k=40, repetition_penalty=1.1)
_SCALES: tuple[AdapterScales, ...] = ((), ((0, 1.0),), ((1, 1.0),), ((0, 0.5), (1, 1.0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds a model, an adapter for the cluster file, and a folder of adapters that are loaded later."""
    folder = tmp_path_factory.mktemp("model")
    model = build_tiny_model(folder / "tiny.gguf", layers=6, context=CONTEXT, quant_type=QuantType.F32)
    (folder / "further").mkdir()
    build_adapter(folder / "first.gguf", model, rank=8)
    build_adapter(folder / "further" / "second.gguf", model, rank=3, parts=("attn_v", "ffn_down"), seed=2)
    build_adapter(folder / "further" / "third.gguf", model, rank=2, seed=3)
    return folder


def cluster_of(folder: Path, state_dir: Path, workers: int, *, first: tuple[str, ...] = ("first",)) -> ClusterConfig:
    paths = {"first": folder / "first.gguf", "second": folder / "further" / "second.gguf"}
    adapters = [{"name": name, "path": str(paths[name])} for name in first]
    api = {"adapter_folder": str(folder / "further")}
    return config(folder / "tiny.gguf", state_dir, workers, adapters=adapters, api=api, timeouts={"worker": "60s"})


def requests(tokens: int = 90, scales: tuple[AdapterScales, ...] = _SCALES) -> tuple[GenerationRequest, ...]:
    """Returns a greedy and a seeded request for each choice of adapters. All prompts have the same prefix."""
    source = Random(SEED)
    shared = [source.randrange(3, 320) for _ in range(40)]
    return tuple(
        GenerationRequest(
            f"request {2 * i + is_seeded}",
            (*shared, *(source.randrange(3, 320) for _ in range(5 * i))),
            tokens,
            _SEEDED if is_seeded else SamplingParams(),
            seed=i,
            adapters=adapters,
        )
        for i, adapters in enumerate(scales)
        for is_seeded in (False, True)
    )


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """Returns the answers of one worker that had both adapters from the start, to requests that are sent one by one."""

    async def alone() -> list[Answer]:
        settings = cluster_of(folder, tmp_path_factory.mktemp("alone"), 1, first=("first", "second"))
        async with recovering(settings) as run:
            return [await run.start((request,))[0] for request in requests()]

    return asyncio.run(alone())


async def test_a_loaded_adapter_answers_as_one_of_the_start(
    folder: Path, expected: list[Answer], tmp_path: Path
) -> None:
    """The adapter also works beside running requests, after a worker was killed, and with the next coordinator."""
    async with recovering(cluster_of(folder, tmp_path, 2)) as run:
        before = run.start(requests()[:4])
        await run.token(20)
        epoch = run.cluster.supervisor.number
        loader = run.cluster.models[0].loader
        await loader.load("second", "second.gguf")
        assert run.cluster.supervisor.number == epoch and loader.adapters.number_of("second") == 1
        answers = run.start(requests()[4:])
        assert [*await asyncio.gather(*before), *await asyncio.gather(*answers)] == expected, f"seed {SEED}"
        assert "lost" not in " ".join(run.told), "other streams were not interrupted"
        answering = run.start(requests())
        await run.token(run.tokens + 60)
        run.hurt("b")
        assert await asyncio.gather(*answering) == expected, f"seed {SEED}, after a loss"
    async with recovering(cluster_of(folder, tmp_path, 2)) as run:
        assert run.cluster.models[0].adapters.names == ("first", "second")
        assert await asyncio.gather(*run.start(requests())) == expected, f"seed {SEED}, after a restart"


async def test_members_of_a_group_take_an_adapter_at_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters read rows as floats, so with an adapter the members of a group send each other larger frames."""
    model = build_tiny_model(tmp_path / "q.gguf", layers=2, hidden=512, context=CONTEXT, quant_type=QuantType.Q4_K)
    build_adapter(tmp_path / "late.gguf", model)
    chosen, api = requests(scales=((), ((0, 1.0),))), {"adapter_folder": str(tmp_path)}
    late = [{"name": "late", "path": str(tmp_path / "late.gguf")}]
    async with recovering(config(model, tmp_path / "alone", 1, adapters=late)) as run:
        alone = [await run.start((request,))[0] for request in chosen]
    plan = [{"workers": ["a", "b"], "layers": [0, 2]}]
    async with recovering(config(model, tmp_path / "group", 2, plan=plan, api=api, timeouts={"worker": "60s"})) as run:
        loader, epoch, others = run.cluster.models[0].loader, run.cluster.supervisor.number, asyncio.Event()
        between: list[Answer] = []

        async def late_leader(worker: WorkerHandle, epoch: int, adapters: tuple[AdapterFile, ...]) -> None:
            if worker.name == "a":
                await others.wait()
                between.extend(await asyncio.gather(*run.start(chosen[:2])))
            await set_adapters(worker, epoch, adapters)
            others.set()

        monkeypatch.setattr(epochs, "set_adapters", late_leader)
        await loader.load("late", "late.gguf")
        assert await asyncio.gather(*run.start(chosen)) == alone, f"seed {SEED}"
        others.clear()
        await loader.unload("late")
        between += await asyncio.gather(*run.start(chosen[:2]))
        assert between == 3 * alone[:2], f"seed {SEED}"
        assert run.cluster.supervisor.number == epoch and "lost" not in " ".join(run.told)


async def test_an_adapter_comes_and_goes(folder: Path, expected: list[Answer], tmp_path: Path) -> None:
    """Another adapter can use the name of an unloaded one. Other streams keep their tokens, and the next coordinator
    loads the remaining adapters."""
    chosen = requests()[4:6]
    async with recovering(cluster_of(folder, tmp_path, 2)) as run:
        served = run.cluster.models[0]
        await served.loader.load("second", "second.gguf")
        assert await asyncio.gather(*run.start(chosen)) == expected[4:6], f"seed {SEED}"
        answering = run.start(requests()[:4])
        await run.token(run.tokens + 20)
        epoch = run.cluster.supervisor.number
        await served.loader.unload("second")
        assert run.cluster.supervisor.number == epoch and served.adapters.names == ("first",)
        assert (tmp_path / run.cluster.config.name / "adapters.json").read_text() == "{}"
        with pytest.raises(ParameterError, match="adapter 1 does not exist; the loaded adapters are 0"):
            run.cluster.engine.submit(chosen[0])
        await served.loader.load("second", "third.gguf")
        assert served.adapters.number_of("second") == 1
        others = await asyncio.gather(*run.start(chosen))
        assert all(other != answer for other, answer in zip(others, expected[4:6], strict=True)), "another adapter"
        apart = [replace(request, cache_salt="apart") for request in chosen]
        assert await asyncio.gather(*run.start(apart)) == others, "no KV block of the adapter that had its number"
        await served.loader.unload("second")
        await served.loader.load("second", "second.gguf")
        assert await asyncio.gather(*run.start(chosen)) == expected[4:6], f"seed {SEED}, loaded again"
        await served.loader.unload("second")
        assert await asyncio.gather(*answering) == expected[:4], f"seed {SEED}, of other streams"
        assert "lost" not in " ".join(run.told), "other streams were not interrupted"
    async with recovering(cluster_of(folder, tmp_path, 1)) as run:
        assert run.cluster.models[0].adapters.names == ("first",)
        assert await asyncio.gather(*run.start(requests()[:4])) == expected[:4], f"seed {SEED}, after a restart"


async def test_what_cannot_be_unloaded_changes_nothing(folder: Path, expected: list[Answer], tmp_path: Path) -> None:
    """Adapters in use cannot be unloaded. An adapter can be unloaded after its file was deleted."""
    copied = folder / "further" / "copied.gguf"
    copied.write_bytes((folder / "further" / "third.gguf").read_bytes())
    async with recovering(cluster_of(folder, tmp_path, 1)) as run:
        loader, adapters = run.cluster.models[0].loader, run.cluster.models[0].adapters
        await loader.load("second", "second.gguf")
        await loader.load("copied", "copied.gguf")
        epoch = run.cluster.supervisor.number

        async def refused(name: str, why: str) -> None:
            with pytest.raises(LlamaclustError, match=why):
                await loader.unload(name)
            assert adapters.names == ("first", "second", "copied") and run.cluster.supervisor.number == epoch

        await refused("first", "'first' is an adapter of the cluster file")
        await refused("tiny", "model 'tiny' has no adapter 'tiny'")
        adapters.use(((1, 1.0),), 0)
        await refused("second", "1 request uses adapter 'second'")
        adapters.use(((0, 1.0), (1, 0.5)), 0)
        await refused("second", "2 requests use adapter 'second'")
        for scales in (((1, 1.0),), ((0, 1.0), (1, 0.5))):
            adapters.release(scales)
        adapters.default = ((1, 0.5),)
        await refused("second", "set its scale to 0 by POST /lora-adapters")
        adapters.default = ()
        copied.unlink()
        await loader.unload("copied")
        assert adapters.names == ("first", "second")
        assert await asyncio.gather(*run.start(requests()[4:6])) == expected[4:6], f"seed {SEED}"


async def test_what_cannot_be_loaded_changes_nothing(folder: Path, expected: list[Answer], tmp_path: Path) -> None:
    other = build_tiny_model(tmp_path / "other.gguf", layers=6, hidden=128, ffn=64, quant_type=QuantType.F32)
    build_adapter(folder / "further" / "misfit.gguf", other)
    (folder / "further" / "link.gguf").symlink_to(folder / "first.gguf")
    linked = folder / "further" / "linked"
    linked.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
        (linked / name).symlink_to(tmp_path / name)
    async with recovering(cluster_of(folder, tmp_path, 1)) as run:
        loader, epoch = run.cluster.models[0].loader, run.cluster.supervisor.number
        for name, path, why in (
            ("first", "second.gguf", "adapter 'first' is loaded already"),
            ("tiny", "second.gguf", "the name of a model"),
            ("a", "../first.gguf", "is not in the folder of adapters"),
            ("a", str(folder / "first.gguf"), "is not in the folder of adapters"),
            ("a", "link.gguf", "is not in the folder of adapters"),
            ("a", "linked", "is not in the folder of adapters"),
            ("a", "linked/adapter_model.safetensors", "is not in the folder of adapters"),
            ("a", "", "is not in the folder of adapters"),
            ("a", "a\0b", "is not a path"),
            ("a", "absent.gguf", "no adapter is at 'absent.gguf'"),
            ("a", "misfit.gguf", "expected"),
        ):
            with pytest.raises(LlamaclustError, match=why):
                await loader.load(name, path)
        with pytest.raises(ParameterError, match="adapter 1 does not exist; the loaded adapters are 0"):
            run.cluster.engine.submit(replace(requests()[4], request_id="too soon"))
        assert run.cluster.supervisor.number == epoch
        assert await asyncio.gather(*run.start(requests()[:4])) == expected[:4]


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_a_load_leaves_the_prefix_cache_and_takes_the_memory_of_the_adapter(
    folder: Path, expected: list[Answer], tmp_path: Path, workers: int
) -> None:
    async with recovering(cluster_of(folder, tmp_path, workers)) as run:
        loader, engine = run.cluster.models[0].loader, run.cluster.engine

        async def cached(chosen: slice) -> int:
            before = engine.counts.cached_tokens
            answers = [await run.start((request,))[0] for request in requests()[chosen]]
            assert answers == expected[chosen], f"seed {SEED}"
            return engine.counts.cached_tokens - before

        def weight_bytes() -> int:
            """Returns the sum over all stages. Each worker has one stage."""
            stages = [worker.stages.values() for worker in run.cluster.registry.present.values()]
            return sum(loaded.weight_bytes for ((_, loaded),) in stages)

        await cached(slice(0, 4))
        without, alone_bytes = await cached(slice(0, 4)), weight_bytes()
        await loader.load("second", "second.gguf")
        adapter = read_adapter(folder / "further" / "second.gguf", loader.model.plain)
        assert weight_bytes() - alone_bytes == sum(tensor.resident_bytes for tensor in adapter.tensors.values())
        assert await cached(slice(0, 4)) == without > 0, "as many as without a load"
        assert await cached(slice(4, 8)) > 0, "of each choice the second request"
        await loader.unload("second")
        assert weight_bytes() == alone_bytes and await cached(slice(0, 4)) == without


async def test_a_worker_lost_while_an_adapter_is_loaded(
    folder: Path, expected: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load fails, running requests are answered, and the next load succeeds."""
    async with recovering(cluster_of(folder, tmp_path, 2)) as run:
        answering, loader = run.start(requests()[:4]), run.cluster.models[0].loader
        await run.token(20)

        async def hurt(worker: WorkerHandle, epoch: int, adapters: tuple[AdapterFile, ...]) -> None:
            if worker.name == "b" and worker.loss is None:
                run.hurt("b")
                await worker.lost.wait()
            await set_adapters(worker, epoch, adapters)

        with monkeypatch.context() as patched:
            patched.setattr(epochs, "set_adapters", hurt)
            with pytest.raises(WorkerError, match="worker b"):
                await loader.load("second", "second.gguf")
        assert loader.adapters.names == ("first",) and 1 not in run.cluster.engine.scheduler.settings.adapters
        assert not (tmp_path / run.cluster.config.name / "adapters.json").exists()
        await loader.load("second", "second.gguf")  # The load waits for the recovery.
        assert await asyncio.gather(*run.start(requests()[4:])) == expected[4:], f"seed {SEED}"
        assert await asyncio.gather(*answering) == expected[:4], f"seed {SEED}, of requests that ran"


async def test_without_memory_for_the_adapter_all_is_as_before(
    folder: Path, expected: list[Answer], tmp_path: Path
) -> None:
    build_adapter(folder / "further" / "large.gguf", folder / "tiny.gguf", rank=MAX_ADAPTER_RANK)
    limited = config(folder / "tiny.gguf", tmp_path, [{"name": "a", "memory": "115MiB", "threads": 1}])
    settings = cluster_of(folder, tmp_path, 1).model_copy(update={"workers": limited.workers})
    async with recovering(settings) as run:
        epoch, loader = run.cluster.supervisor.number, run.cluster.models[0].loader
        answering = run.start(requests()[:4])
        await run.token(10)
        with pytest.raises(InsufficientMemoryError, match=r"with other adapters need \d+ MiB .* MiB are missing"):
            await loader.load("large", "large.gguf")
        assert run.cluster.supervisor.number == epoch and loader.adapters.names == ("first",)
        assert await asyncio.gather(*answering) == expected[:4]
        assert not (tmp_path / settings.name / "adapters.json").exists()
