"""Checks that clusters with GPUs give the answers of one worker without GPUs, for any placement and after losses."""

from __future__ import annotations

import asyncio
import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from llamaclust.cli.plans.plan import planned, show_plan
from llamaclust.cli.status import gpu_lines
from llamaclust.cluster.config.cluster_config import load_config
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.scheduler.requests import GenerationRequest, TokenSampled
from llamaclust.cluster.server.coordinator import Cluster, open_cluster
from llamaclust.cluster.server.status import cluster_status
from llamaclust.cluster.server.worker_metrics import WorkerMetrics
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.model.quant_types import QuantType
from llamaclust.worker.devices import backends
from support.cuda.shim_device import ShimDevice
from support.models.tiny_model import build_tiny_model
from support.paths import TESTS

DEADLINE_S = 120.0
GENERATIONS = (
    GenerationRequest("greedy", (5, 9, 17, 33, 65, 3, 7), 6),
    GenerationRequest("seeded", (4, 8, 15), 6, SamplingParams(temperature=0.9, top_k=20), seed=3),
)
Answer = list[tuple[int, bytes]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "tiny.gguf"
    small = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocabulary": 320}
    return build_tiny_model(path, layers=4, quant_type=QuantType.Q8_0, **small)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def shim(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces GPUs by the shim in processes that tests start, unless a real GPU is tested."""
    if request.config.getoption("--gpu", default=False):
        return
    folders = [TESTS / "kernels" / "cuda" / "shim_site", TESTS]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")]))


async def generation(cluster: Cluster, wanted: GenerationRequest, on_token: Callable[[], None]) -> Answer:
    rows = []
    async for event in cluster.engine.submit(wanted):
        if isinstance(event, TokenSampled):
            rows.append(event.row)
            on_token()
    return [(row.token, struct.pack("<f", row.logprob)) for row in rows]


@dataclass(frozen=True, slots=True)
class Run:
    """The results of a cluster's run."""

    answers: list[Answer]
    status: dict[str, Any]
    recoveries: int
    metrics: str


def has_reported_copies(worker: WorkerHandle) -> bool:
    """Returns whether heartbeats report copies of experts, or the GPU has no memory for any."""
    wanted = any(part.experts_cache_bytes for part in worker.device_layers)
    beat = worker.heartbeat
    return not wanted or (beat is not None and beat.experts_cache_copied_bytes > 0)


async def run(
    model: Path,
    folder: Path,
    *overrides: str,
    on_token: Callable[[], None] = lambda: None,
    until: Callable[[], bool] = lambda: True,
) -> Run:
    """Generates `GENERATIONS`, again and again until `until` is true. All answers are the same."""
    config = load_config(None, [f"model={model}", "context_length=64", "max_sequences=2", *overrides])
    directory = ClusterDir(folder)
    directory.create()
    async with asyncio.timeout(DEADLINE_S), open_cluster(config, [model], directory) as cluster:
        found = await asyncio.gather(*(generation(cluster, one, on_token) for one in GENERATIONS))
        while not until():
            assert found == await asyncio.gather(*(generation(cluster, one, on_token) for one in GENERATIONS))
        while not all(map(has_reported_copies, cluster.registry.workers.values())):  # noqa: ASYNC110  no event tells
            await asyncio.sleep(0.05)
        status = cluster_status(cluster, ClusterRecord("x", 1, "http://x", "m"))
        registry = CollectorRegistry()
        registry.register(WorkerMetrics(lambda: cluster.registry.workers, lambda: {}))
        return Run(found, status, cluster.supervisor.recoveries, generate_latest(registry).decode())


@pytest.fixture(scope="module")
def wanted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    one = "workers=[{name: a, threads: 1, memory_bandwidth_gb_s: 20, int8_gmac_s: 300}]"
    return asyncio.run(run(model, tmp_path_factory.mktemp("one"), one)).answers


RULE = r"placement=[{tensors: 'blk\.[023]\.ffn_.*_exps', device: CPU, workers: [a]}]"


@pytest.mark.parametrize(
    ("rules", "moved"),
    [
        (["cpu_moe=all", "experts_cache=4MiB"], (0, 1, 2)),
        (["cpu_moe=2", "experts_cache=0"], (0, 1)),
        (["cpu_moe=all", "workers.0.cpu_moe=1"], (0,)),
        ([RULE], (0, 2)),
        ([RULE, "workers.0.cpu_moe=2"], (0, 1, 2)),
    ],
)
def test_experts_in_ram(tmp_path: Path, rules: list[str], moved: tuple[int, ...]) -> None:
    """The plan, the loaded layers and the status agree on experts in RAM and on memory for their copies, which are
    made. Another worker has no GPU."""
    model = tmp_path / "mixture.gguf"
    small = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocabulary": 320, "experts": 4}
    build_tiny_model(model, layers=4, quant_type=QuantType.Q8_0, **small)  # type: ignore[arg-type]
    other = "{name: b, threads: 1, memory_bandwidth_gb_s: 20, int8_gmac_s: 300}"
    wanted = asyncio.run(run(model, tmp_path / "one", f"workers=[{other}]")).answers
    plan = "plan=[{worker: a, layers: [0, 3]}, {worker: b, layers: [3, 4]}]"
    gpu = "{name: a, threads: 1, device: cuda:0}"
    done = asyncio.run(run(model, tmp_path / "two", f"workers=[{gpu}, {other}]", plan, *rules))
    assert done.answers == wanted
    worker = done.status["status"]["workers"][0]
    held = done.status["plan"]["stages"][0]["devices"]
    cache_bytes = held[0]["experts_cache_bytes"]
    assert worker["device_layers"] == [
        {"device": "cuda:0", "layers": (0, 3), "cpu_moe": moved, "experts_cache_bytes": cache_bytes}
    ]
    if "experts_cache=4MiB" in rules:
        assert cache_bytes == 4 << 20
    assert (cache_bytes == 0) == ("experts_cache=0" in rules)
    counts = dict(re.findall(r'worker_experts_cache_(\w+)\{worker="a"\} (\S+)', done.metrics))
    assert (float(counts["misses_total"]) > 0) == (float(counts["copied_bytes_total"]) > 0) == (cache_bytes > 0)
    assert [(part["device"], part["start"], part["end"], part["is_experts"]) for part in held] == [
        ("cuda:0", 0, 3, False),
        ("cpu", 0, moved[-1] + 1, True),
    ]
    assert [part["cpu_moe"] for part in held] == [moved, moved]


def test_a_gpu_with_layers_in_ram_beside_a_worker_without(model: Path, wanted: list[Answer], tmp_path: Path) -> None:
    gpu = "{name: a, threads: 1, device: cuda:0, gpu_layers: 2}"
    plan = "plan=[{worker: a, layers: [0, 3]}, {worker: b, layers: [3, 4]}]"
    done = asyncio.run(
        run(
            model,
            tmp_path,
            f"workers=[{gpu}, {{name: b, threads: 1, memory_bandwidth_gb_s: 20, int8_gmac_s: 300}}]",
            plan,
        )
    )
    assert done.answers == wanted
    stage, worker = done.status["plan"]["stages"][0], done.status["status"]["workers"][0]
    assert [(one["device"], one["start"], one["end"]) for one in stage["devices"]] == [("cpu", 0, 1), ("cuda:0", 1, 3)]
    held = [("cpu", (0, 1), (), 0), ("cuda:0", (1, 3), (), 0)]
    assert [tuple(part.values()) for part in worker["device_layers"]] == held
    (other,) = done.status["status"]["workers"][1]["device_layers"]
    assert other == {"device": "cpu", "layers": (3, 4), "cpu_moe": (), "experts_cache_bytes": 0}
    told = "2 of 3 layers on GPUs: [0, 1) cpu, [1, 3) cuda:0"
    assert next(gpu_lines(done.status["status"]["workers"])) == f"a: {told}"
    assert f"layers [0, 3) are loaded as epoch 1.1, {told}" in (tmp_path / "logs" / "a.log").read_text()
    assert ('llamaclust_worker_layers{device="cuda:0",worker="a"} 2.0') in done.metrics
    assert ('llamaclust_worker_layers{device="cpu",worker="b"} 1.0') in done.metrics
    least = stage["weight_bytes"] + stage["kv_bytes"]
    assert worker["device"] == "cuda:0" and least < worker["memory_bytes"] <= least + stage["workspace_bytes"]
    (gpu_now,) = worker["gpus"]
    assert gpu_now["device"] == "cuda:0" and gpu_now["total_bytes"] >= 256 << 20
    assert 0 < stage["devices"][1]["memory_bytes"] <= gpu_now["total_bytes"]
    assert done.status["plan"]["token_ms"] > 0, "measured"


@pytest.mark.promise
def test_stages_on_a_gpu_on_both_and_on_a_processor(model: Path, wanted: list[Answer], tmp_path: Path) -> None:
    """Each stage has its own worker; two workers have the same GPU."""
    workers = (
        "{name: gpu, threads: 1, device: cuda:0}",
        "{name: both, threads: 1, device: cuda:0, gpu_layers: 1}",
        "{name: none, threads: 1, memory_bandwidth_gb_s: 20, int8_gmac_s: 300}",
    )
    plan = "plan=[{worker: gpu, layers: [0, 1]}, {worker: both, layers: [1, 3]}, {worker: none, layers: [3, 4]}]"
    done = asyncio.run(run(model, tmp_path, f"workers=[{', '.join(workers)}]", plan))
    assert done.answers == wanted
    held = [[one["device"] for one in stage["devices"]] for stage in done.status["plan"]["stages"]]
    assert held == [["cuda:0"], ["cpu", "cuda:0"], []]


def test_a_worker_whose_gpu_is_lost_is_a_lost_worker(
    model: Path, wanted: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker logs the reason and restarts, and its requests continue."""
    if "shim_site" not in os.environ.get("PYTHONPATH", ""):
        pytest.skip("a real card cannot be lost on demand")
    order = tmp_path / "lose it"
    monkeypatch.setenv("PYTHON_TEST_LOSE_GPU", str(order))
    given = list[bool]()

    def lose() -> None:
        if not given:
            given.append(True)
            order.touch()

    # The worker may have computed all tokens before the first one is read here.
    workers = "workers=[{name: a, threads: 1, device: [cuda:0, cuda:1]}]"
    done = asyncio.run(run(model, tmp_path / "cluster", workers, on_token=lose, until=lambda: not order.exists()))
    assert given and done.recoveries == 1
    assert done.answers == wanted
    log = (tmp_path / "cluster" / "logs" / "a.log").read_text()
    assert "cuda:0 is lost: the test's own words" in log and "Traceback" not in log


def test_a_gpu_that_is_lost_while_layers_are_loaded_comes_back(
    model: Path, wanted: list[Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "shim_site" not in os.environ.get("PYTHONPATH", ""):
        pytest.skip("a real card cannot be lost on demand")
    order = tmp_path / "lose it"
    order.write_text("prepare")
    monkeypatch.setenv("PYTHON_TEST_LOSE_GPU", str(order))
    done = asyncio.run(run(model, tmp_path / "cluster", "workers=[{name: a, threads: 1, device: cuda:0}]"))
    assert done.answers == wanted and not order.exists()


def test_a_plan_knows_the_gpu_before_a_start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build_shim: Callable[..., Path]
) -> None:
    device, opened = ShimDevice(build_shim(), memory_bytes=64 << 20), list[str]()

    def open_gpu(name: str, threads: int, memory_cap_bytes: int | None, *folders: object) -> CudaBackend:
        opened.append(name)
        return CudaBackend(name, device, threads)

    monkeypatch.setattr(backends, "open_gpu", open_gpu)
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(tmp_path))
    given = [f"model={model}", "context_length=64", "max_sequences=2"]
    workers = "workers=[{name: a, device: cuda, gpu_layers: 3}, {name: b, memory: 1GiB}]"
    manual = "plan=[{worker: a, layers: [0, 4]}]"  # launches of so small a model take longer than a processor
    plan = planned(load_config(None, [*given, workers, manual])).plan
    parts = [(one.device, one.start, one.end) for stage in plan.stages for one in stage.devices]
    assert parts == [("cpu", 0, 1), ("cuda:0", 1, 4)]
    assert opened == ["cuda:0"], "opened once, for all that is to be known"
    assert plan.prediction is None, "nothing was measured here"
    device.memory_bytes = 3 << 20
    told = r"a cuda:0 2;.* MiB are missing.*; or set gpu_layers to auto: the model then fits, with [0-3] layers on GPUs"
    with pytest.raises(InsufficientMemoryError, match=told):
        planned(load_config(None, [*given, "workers=[{name: a, device: cuda, gpu_layers: 4}]"]))


def test_a_plan_shows_what_rules_did(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    build_shim: Callable[..., Path],
) -> None:
    library = build_shim()
    monkeypatch.setattr(backends, "open_gpu", lambda name, threads, *_: CudaBackend(name, ShimDevice(library), threads))
    monkeypatch.setenv("LLAMACLUST_STATE_DIR", str(tmp_path))
    model = tmp_path / "mixture.gguf"
    small = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocabulary": 320, "experts": 4}
    build_tiny_model(model, layers=4, quant_type=QuantType.Q8_0, **small)  # type: ignore[arg-type]
    given = [f"model={model}", "context_length=64", "workers=[{name: a, device: cuda}, {name: b}]", "max_sequences=2"]
    given.append("plan=[{worker: a, layers: [0, 4]}]")
    rule = r"blk\.[13]\.ffn_.*_exps"
    show_plan(None, [*given, f"placement=['{rule}=CPU']"], as_json=False)
    shown = capsys.readouterr().out
    assert "    cpu: experts of layers [1, 2), [3, 4), " in shown
    assert f"  placement: '{rule}=ram' decides on 6 tensors with " in shown
    show_plan(None, [*given, f"placement=['{rule}=CPU']"], as_json=True)
    (told,) = json.loads(capsys.readouterr().out)["placement"]
    assert (told["tensors"], told["device"], told["count"]) == (rule, "ram", 6) and told["bytes"] > 0
    for mistake, line in {
        "placement=[expz=CPU]": "placement: 'expz=ram' matches none of ",
        "placement=['blk.3.=CPU']": "placement: layer 3 in RAM comes after layer 0, .* (worker a)",
        "placement=[exps=CUDA7]": "there is no cuda:7 among cuda:0; name one of these, or `gpu` for any GPU (worker a)",
        "placement=[{tensors: exps, device: CPU, workers: [b]}]": "applies to no worker with a GPU, and workers",
    }.items():
        with pytest.raises(UsageError, match=line.replace("(", r"\(").replace(")", r"\)")):
            planned(load_config(None, [*given, mistake]))
