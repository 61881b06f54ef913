"""Checks that clusters give the answers of one worker without GPUs if a group with GPUs holds their stage."""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.scheduler.requests import GenerationRequest, TokenSampled
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.state.directory import ClusterDir
from llamaclust.core.errors import UsageError
from llamaclust.core.gpus import Gpu
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sizes import MIB
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import QuantType
from support.models.tiny_model import build_tiny_model
from support.paths import TESTS

DEADLINE_S = 240.0
GENERATIONS = (
    GenerationRequest("greedy", (5, 9, 17, 33, 65, 3, 7), 6),
    GenerationRequest("seeded", (4, 8, 15), 6, SamplingParams(temperature=0.9, top_k=20), seed=3),
)
FIGURES = "memory_bandwidth_gb_s: 20, int8_gmac_s: 300"
CPU = "threads: 1, " + FIGURES
Answer = list[tuple[int, bytes]]


def build(path: Path, **more: Any) -> Path:
    small: dict[str, Any] = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocabulary": 320}
    return build_tiny_model(path, layers=4, quant_type=QuantType.Q8_0, **(small | more))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("gpu") / "tiny.gguf")


@pytest.fixture(autouse=True)
def shim(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.config.getoption("--gpu", default=False):
        folders = [TESTS / "kernels" / "cuda" / "shim_site", TESTS]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")]))


async def generation(cluster: Cluster, wanted: GenerationRequest) -> Answer:
    events = [event async for event in cluster.engine.submit(wanted)]
    rows = [event.row for event in events if isinstance(event, TokenSampled)]
    return [(row.token, struct.pack("<f", row.logprob)) for row in rows]


async def answers(model: Path, folder: Path, *overrides: str) -> tuple[list[Answer], list[Any]]:
    """Returns the answers, and the layers that each worker's devices hold."""
    config = load_config(None, [f"model={model}", "context_length=64", "max_sequences=2", *overrides])
    directory = ClusterDir(folder)
    directory.create()
    async with asyncio.timeout(DEADLINE_S), open_cluster(config, [model], directory) as cluster:
        found = await asyncio.gather(*(generation(cluster, one) for one in GENERATIONS))
        held = {name: worker.device_layers for name, worker in cluster.registry.workers.items()}
        return found, [[(part.device, part.start, part.end) for part in held[name]] for name in sorted(held)]


@pytest.mark.parametrize(
    ("first", "second", "held"),
    [
        ("device: cuda:0", CPU, [[("cuda:0", 0, 4)], [("cpu", 0, 4)]]),
        (CPU, "device: cuda:0, gpu_layers: 3", [[("cpu", 0, 4)], [("cpu", 0, 1), ("cuda:0", 1, 4)]]),
        ("device: cuda:0", "device: cuda:0, gpu_layers: 2", [[("cuda:0", 0, 4)], [("cpu", 0, 2), ("cuda:0", 2, 4)]]),
    ],
    ids=["a GPU leads", "a GPU and a processor follow", "GPUs alone"],
)
def test_answers_are_those_of_one_worker(model: Path, tmp_path: Path, first: str, second: str, held: list[Any]) -> None:
    expected, _ = asyncio.run(answers(model, tmp_path / "one", f"workers=[{{name: a, {CPU}}}]"))
    workers = f"workers=[{{name: a, {first}}}, {{name: b, {second}}}]"
    plan = "plan=[{workers: [a, b], layers: [0, 4], shares: [1, 1]}]"
    assert asyncio.run(answers(model, tmp_path / "two", workers, plan)) == (expected, held)


def test_each_device_has_its_part_of_a_portion(model: Path) -> None:
    """A member of a group needs less memory than a worker alone; layers that do not fit on its GPU are in RAM."""
    given = [f"model={model}", "context_length=64", "max_sequences=2"]
    workers = "workers=[{name: a, device: cuda:0}, {name: b}]"
    group = load_config(None, [*given, workers, "plan=[{workers: [a, b], layers: [0, 4], shares: [1, 1]}]"])
    alone = load_config(None, [*given, workers, "plan=[{worker: a, layers: [0, 4]}]"])
    with Model.open(model) as opened:
        for gpu_mib, layers_alone, layers_of_group in ((100, 4, 4), (0, 0, 0)):
            gpu = Gpu("cuda:0", "card", gpu_mib * MIB, gpu_mib * MIB)
            resources = {"a": WorkerResources("a", 1 << 30, gpus=(gpu,)), "b": WorkerResources("b", 1 << 30)}
            for config, layers in ((alone, layers_alone), (group, layers_of_group)):
                plan = plan_cluster(config, opened, ClusterResources(resources, {}))
                parts = plan.stages[0].devices
                assert sum(part.end - part.start for part in parts if part.device == "cuda:0") == layers
        whole, member = (
            plan_cluster(config, opened, ClusterResources({**resources, "a": with_gpu}, {})).stages[0]
            for with_gpu in [WorkerResources("a", 1 << 30, gpus=(Gpu("cuda:0", "card", 100 * MIB, 100 * MIB),))]
            for config in (alone, group)
        )
        assert member.kv_bytes < whole.kv_bytes and member.weight_bytes < whole.weight_bytes


def test_experts_and_a_gpu_are_refused_by_name(tmp_path: Path) -> None:
    path = build(tmp_path / "mixture.gguf", experts=4)
    given = [f"model={path}", "context_length=64", "workers=[{name: a}, {name: b, device: cuda:0}]"]
    config = load_config(None, [*given, "plan=[{workers: [a, b], layers: [0, 4], shares: [1, 1]}]"])
    with (
        Model.open(path) as opened,
        pytest.raises(UsageError, match=r"divides experts on CPUs only, but b has cuda:0; set the device of b to cpu"),
    ):
        plan_cluster(
            config,
            opened,
            ClusterResources(
                {
                    "a": WorkerResources("a", 1 << 30),
                    "b": WorkerResources("b", 1 << 30, gpus=(Gpu("cuda:0", "card", MIB, MIB),)),
                },
                {},
            ),
        )
