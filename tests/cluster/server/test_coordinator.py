"""Tests what `open_cluster` asks of workers and of the machine, on clusters of real processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sized
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llamaclust.cli.plans.plan import planned
from llamaclust.cluster.config.cluster_config import ClusterConfig, load_config
from llamaclust.cluster.config.environment import FEATURE_LEVELS
from llamaclust.cluster.control.limits import check_plan
from llamaclust.cluster.control.planning import ClusterPlanner, ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources, memory_shares
from llamaclust.cluster.launchers.arrivals import Shortfall
from llamaclust.cluster.launchers.base import Launcher
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.server import coordinator, start
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.server.status import cluster_status
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.cluster.state.measurements import read_profiles, write_profiles
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.profile import DeviceProfile, Profile
from llamaclust.kernels import _native
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.wire.rpc.deadlines import deadline
from support.models.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", layers=4, context=256)


@asynccontextmanager
async def opened(model: Path, folder: Path, **values: object) -> AsyncIterator[Cluster]:
    speeds = {"memory_bandwidth_gb_s": 20.0, "int8_gmac_s": 300.0}
    workers = [{"name": "a", "threads": 1, **speeds}, {"name": "b", "threads": 1, **speeds}]
    base = {"model": str(model), "workers": workers, "objective": "throughput", "context_length": 256}
    config = ClusterConfig.model_validate({**base, "state_dir": folder, **values})
    directory = ClusterDir(folder / config.name)
    with directory.locked():
        async with open_cluster(config, [model], directory) as cluster:
            yield cluster


async def next_heartbeat(worker: WorkerHandle) -> None:
    """Waits until the worker has sent another heartbeat."""
    last = worker.heartbeat
    while worker.heartbeat is last:
        assert worker.loss is None, worker.loss
        await asyncio.sleep(0.01)


async def test_heartbeats_keep_up_with_a_short_timeout(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interval of heartbeats is a share of the timeout."""
    monkeypatch.setattr(start, "_HEARTBEAT_S", 60.0)
    monkeypatch.setattr(start, "_HEARTBEATS", 120)
    async with opened(tiny, tmp_path, timeouts={"worker": 60.0}) as cluster:
        async with deadline("signs of life", 50):
            for _ in range(5):
                await asyncio.gather(*map(next_heartbeat, cluster.registry.workers.values()))
        assert cluster.engine.error is None
        status = cluster_status(cluster, ClusterRecord("default", 1, "http://127.0.0.1:1", "tiny"))
    for worker in status["status"]["workers"]:
        assert worker["heartbeat"]["resident_bytes"] > 1 << 20 and worker["heartbeat"]["free_memory_bytes"] > 0
        assert (worker["threads"], worker["feature_level"]) == (
            1,
            cluster.registry.workers["a"].registration.feature_level,
        )


async def test_measurements_are_kept_for_every_cluster_of_the_machine(tiny: Path, tmp_path: Path) -> None:
    """A cluster of another name measures nothing; values of a cluster file are not kept as measurements."""
    async with opened(tiny, tmp_path):
        assert read_profiles(tmp_path) == {}
    workers = [{"name": "a", "threads": 1}, {"name": "b", "threads": 1}]
    async with opened(tiny, tmp_path, name="first", workers=workers):
        kept = read_profiles(tmp_path)
    assert len(kept) == 2, "with the model and without it"
    made_up = dict.fromkeys(kept, Profile(DeviceProfile(7.0, 8.0)))
    write_profiles(tmp_path, made_up)
    async with opened(
        tiny, tmp_path, name="second", workers=[{**one, "name": f"{one['name']}2"} for one in workers]
    ) as cluster:
        assert read_profiles(tmp_path) == made_up
        plan = cluster.plan
    requests = ClusterDir(tmp_path / "taken-over").journal
    requests.parent.mkdir()
    requests.write_bytes(b"left by a coordinator that was killed\n")
    async with opened(tiny, tmp_path, name="taken-over", workers=workers[:1]):
        assert read_profiles(tmp_path) == made_up, "requests wait: a machine with fewer workers is not measured again"
    file = tmp_path / "cluster.yaml"
    values = {"name": "third", "model": str(tiny), "objective": "throughput", "context_length": 256}
    file.write_text(json.dumps({**values, "state_dir": str(tmp_path), "workers": workers}))
    known = planned(load_config(file)).plan
    assert known.prediction is not None and plan.prediction is not None
    assert known.prediction.token_s == plan.prediction.token_s
    assert planned(load_config(file, ["workers.a.threads=2"])).plan.prediction is None


def test_a_feature_level_that_is_not_there_is_refused_before_a_worker_starts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = _native.available_levels()
    level = next(level for level in FEATURE_LEVELS if level not in there)
    monkeypatch.setenv("LLAMACLUST_FEATURE_LEVEL", level)
    says = f"feature level {level!r} is not available on this machine; available: {', '.join(there)}"

    async def start() -> None:
        async with opened(tiny, tmp_path):
            pass

    with pytest.raises(UsageError) as caught:
        asyncio.run(start())
    assert (str(caught.value), caught.value.exit_code) == (says, 2)
    assert not list(tmp_path.rglob("*.log"))
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps({"model": str(tiny), "state_dir": str(tmp_path), "workers": [{"name": "a"}]}))
    with pytest.raises(UsageError) as caught:
        planned(load_config(file))
    assert str(caught.value) == says


@pytest.mark.parametrize(("workers", "refused"), [(1, False), (2, True)])
def test_microbatches_that_fit_in_no_message_are_refused(tiny: Path, workers: int, refused: bool) -> None:
    hyperparameters = SimpleNamespace(embedding_length=1 << 16, context_length=256)
    facts = {"hidden_bytes": 4 << 17, "layer_count": 1, "projector": None, "is_causal": True}
    model: Any = SimpleNamespace(hyperparameters=hyperparameters, **facts)
    values = {"model": "m", "context_length": 256, "workers": [{"name": f"w{index}"} for index in range(workers)]}
    config = ClusterConfig.model_validate(values)
    with pytest.raises(UsageError, match=r"544 tokens, but .* holds only 448 ") if refused else nullcontext():
        check_plan(config, model)


def test_more_stages_than_a_result_can_name_are_refused(tmp_path: Path) -> None:
    model = Model.open(build_tiny_model(tmp_path / "deep.gguf", layers=256, context=64))
    names = [f"w{index}" for index in range(256)]
    plan = [{"worker": name, "layers": [index, index + 1]} for index, name in enumerate(names)]
    values = {"model": "m", "context_length": 64, "workers": [{"name": name} for name in names], "plan": plan}
    config = ClusterConfig.model_validate(values)
    with pytest.raises(UsageError, match="256 stages; the limit is 255"):
        plan_cluster(config, model, ClusterResources({name: WorkerResources(name, 1 << 40) for name in names}, {}))


@pytest.mark.parametrize("kv_type", KvType)
async def test_stages_take_what_the_plan_promised(kv_type: KvType, tiny: Path, tmp_path: Path) -> None:
    async with opened(tiny, tmp_path, kv_type=kv_type.value) as cluster:
        layer = cluster.model.program(0, 1).kv_layers[0]
        promised = cluster.plan.kv_blocks * 16 * layer.kv_heads * kv_type.pair_bytes(layer.head_dim)
        assert sum(stage.kv_bytes for stage in cluster.plan.stages) == cluster.model.layer_count * promised
        for stage in cluster.plan.stages:
            ((_, loaded),) = cluster.registry.workers[stage.worker].stages.values()
            assert (loaded.kv_bytes, loaded.workspace_bytes) == (stage.kv_bytes, stage.workspace_bytes)
            assert loaded.weight_bytes == pytest.approx(stage.weight_bytes, rel=0.02)


def test_memory_is_promised_once() -> None:
    assert memory_shares({"a": 60, "b": None}, 100) == {"a": 50, "b": 50}
    assert memory_shares({"a": 20, "b": None, "c": None}, 100) == {"a": 20, "b": 40, "c": 40}
    assert memory_shares({"a": 30, "b": 20}, 100) == {"a": 30, "b": 20}
    assert memory_shares({"a": 300, "b": 20}, 100) == {"a": 80, "b": 20}


async def test_errors_of_a_start_name_the_model_of_several(tiny: Path, tmp_path: Path) -> None:
    entries = [
        {"model": str(tiny), "name": name, "context_length": tokens} for name, tokens in (("a", 256), ("b", 257))
    ]
    values = {"models": entries, "workers": [{"name": "w"}], "state_dir": tmp_path}
    config, directory = ClusterConfig.model_validate(values), ClusterDir(tmp_path / "default")
    with (
        directory.locked(),
        pytest.raises(UsageError, match="models: 'b': context_length is 257, but the model was"),
    ):
        async with open_cluster(config, [tiny, tiny], directory):
            pass


@pytest.mark.parametrize(("needed", "kept"), [(1, {"b", "c", "x"}), (2, {"c", "x"}), (4, {"b", "c", "x"})])
async def test_a_start_uses_drained_workers_that_the_model_needs(needed: int, kept: set[str], tmp_path: Path) -> None:
    async def plan(workers: Sized, **_: object) -> None:
        if len(workers) < needed:
            raise InsufficientMemoryError("it needs 3 MiB more")

    config = ClusterConfig.model_validate({"model": "n", "workers": [{"name": "a"}, {"name": "b"}]})
    planner = cast(ClusterPlanner, SimpleNamespace(config=config, plan=plan))
    registry = cast(Registry, SimpleNamespace(present=dict.fromkeys("abc")))
    record, events = ControlRecord.begin(tmp_path / "control"), list[Event]()
    await record.drain(frozenset({"b", "c", "x"}))
    await coordinator._undrain_needed([planner], registry, record, events.append)
    assert record.drained == ControlRecord.begin(tmp_path / "control").drained == kept
    why = "b: drained, but needed, because the others do not suffice: it needs 3 MiB more"
    assert events == ([Notice(why)] if needed == 2 else [])


async def test_a_start_leaves_workers_drained_that_the_model_does_not_need(tmp_path: Path) -> None:
    memory = {"a": 2, "b": 1, "c": 2, "d": 1}

    async def plan(workers: Iterable[str], **_: object) -> None:
        if sum(memory[name] for name in workers) < 4:
            raise InsufficientMemoryError("it needs 2 MiB more")

    config = ClusterConfig.model_validate({"model": "n", "workers": [{"name": "a"}]})
    planner = cast(ClusterPlanner, SimpleNamespace(config=config, plan=plan))
    registry = cast(Registry, SimpleNamespace(present=dict.fromkeys(memory)))
    record = ControlRecord.begin(tmp_path / "control")
    await record.drain(frozenset("bcd"))
    await coordinator._undrain_needed([planner], registry, record, lambda event: None)
    assert record.drained == {"b", "d"}


async def test_a_start_counts_drained_workers_where_it_is_asked_to(tmp_path: Path) -> None:
    async def plan(workers: Iterable[str], **_: object) -> None:
        if len([*workers]) < 2:
            raise InsufficientMemoryError("it needs 3 MiB more")

    async def joined(_: object, shortfall: Shortfall) -> None:
        assert [str(await shortfall(with_drained)) for with_drained in (False, True)] == ["it needs 3 MiB more", "None"]

    config = ClusterConfig.model_validate({"model": "n", "workers": [{"name": name} for name in "abc"]})
    planner = cast(ClusterPlanner, SimpleNamespace(config=config, plan=plan))
    registry = cast(Registry, SimpleNamespace(present=dict.fromkeys("ac")))
    record, launcher = ControlRecord.begin(tmp_path / "control"), cast(Launcher, SimpleNamespace(joined=joined))
    await record.drain(frozenset("c"))
    await coordinator._joined([planner], registry, launcher, record, lambda event: None)
    assert record.drained == frozenset()


@pytest.mark.parametrize("several", [False, True])
async def test_a_plan_that_fails_names_its_model_of_several(several: bool) -> None:
    async def plan(workers: object, **_: object) -> Plan:
        raise InsufficientMemoryError("it needs 3 MiB more")

    model = {"models": [{"model": "m"}, {"model": "n"}]} if several else {"model": "n"}
    own = ClusterConfig.model_validate({**model, "workers": [{"name": "w"}]}).of_each_model()[-1]
    planner = cast(ClusterPlanner, SimpleNamespace(config=own, plan=plan))
    error = await coordinator._shortfall([planner], {})
    assert str(error) == ("models: 'n': it needs 3 MiB more" if several else "it needs 3 MiB more")
