"""Tests of weights in wider tiles: planned where they are faster and fit, and held as planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import model_costs, plan_limits
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster, predict_served
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.links import Pairs
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.roofline import retimed
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError, ProtocolError
from llamaclust.core.gpus import DeviceLayers, Gpu
from llamaclust.core.profile import DeviceProfile, ProductTime, Profile, StepTime
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.quant_types import WIDER_TILES, QuantType
from llamaclust.wire.control.messages import Load
from llamaclust.worker.stage.stage_runner import StageRunner
from support.arithmetic.batches import LIMITS, Chain
from support.models.tiny_model import build_tiny_model

MIB = 1 << 20
BYTE_S = 2e-9


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("wide") / "m.gguf", quant_type=QuantType.IQ2_XXS, ffn=4096)


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return Model.open(path)


def settings(**values: object) -> ClusterConfig:
    workers = [{"name": name, "threads": 1} for name in "ab"]
    base = {"model": "m.gguf", "workers": workers, "context_length": 64, "max_sequences": 1}
    return ClusterConfig.model_validate({**base, **values})


def profile(wide_share: float = 0.4) -> Profile:
    """Returns a processor's profile with measured steps; a byte of wider tiles takes that share of the time."""
    types = {QuantType.IQ2_XXS: BYTE_S, QuantType.IQ2_S: BYTE_S * wide_share}
    products = tuple(ProductTime(int(kind), rows, byte_s) for kind, byte_s in types.items() for rows in (1, 128))
    steps = (StepTime(1, 0.0, BYTE_S, 1e-6), StepTime(128, 0.0, BYTE_S, 1e-6))
    return Profile(DeviceProfile(20e9, 100e9, steps, steps, products, products))


def planned(
    model: Model,
    config: ClusterConfig,
    memory_bytes: int = 1 << 30,
    wide_share: float = 0.4,
    gpus: tuple[Gpu, ...] = (),
    partitions: Pairs = frozenset(),
) -> Plan:
    one = WorkerResources(threads=1, free_memory_bytes=memory_bytes, machine="", machine_free_bytes=0)
    workers = {worker.name: replace(one, machine=worker.name, gpus=gpus) for worker in config.workers}
    profiles = dict.fromkeys(workers, profile(wide_share))
    return plan_cluster(config, model, ClusterResources(workers, profiles, partitions=partitions))


def test_they_are_planned_where_they_are_clearly_faster(model: Model) -> None:
    own, wide = planned(model, settings(wide_tiles=False)), planned(model, settings())
    assert not own.wide_tiles and wide.wide_tiles
    assert own.prediction is not None and wide.prediction is not None
    assert wide.prediction.token_s < 0.8 * own.prediction.token_s
    weights = [sum(stage.weight_bytes for stage in plan.stages) for plan in (own, wide)]
    assert weights[1] / weights[0] == pytest.approx((82 + 16) / (66 + 4), rel=0.02)
    assert "wider tiles" in "\n".join(plan_lines(wide)) and plan_json(wide)["wide_tiles"]
    assert "wider tiles" not in "\n".join(plan_lines(own))
    for share in (0.7, 1.0):  # nearly as slow, or slower
        assert not planned(model, settings(), wide_share=share).wide_tiles


def test_they_are_not_planned_where_memory_is_short(model: Model) -> None:
    """Wider tiles must also leave memory for keys and values."""
    chosen = []
    for memory_bytes in range(2 * MIB, 40 * MIB, MIB // 2):
        try:
            own = planned(model, settings(wide_tiles=False), memory_bytes)
        except InsufficientMemoryError:
            continue
        plan = planned(model, settings(), memory_bytes)
        assert all(stage.bytes <= memory_bytes for stage in plan.stages)
        assert 2 * plan.kv_blocks >= own.kv_blocks
        chosen.append(plan.wide_tiles)
    assert chosen == sorted(chosen) and not chosen[0] and chosen[-1]


def test_a_cut_link_that_only_wider_tiles_need_prevents_no_plan(model: Model) -> None:
    """One worker has room for its own tiles, and only both together have room for wider ones."""
    cut, own = frozenset({frozenset("ab")}), settings(wide_tiles=False)
    memory_bytes = next(size for size in range(0, 1 << 30, MIB // 2) if _fits(model, own, size, cut))
    assert len(planned(model, settings(), memory_bytes).stages) == 2
    plan = planned(model, settings(), memory_bytes, partitions=cut)
    assert len(plan.stages) == 1 and not plan.wide_tiles


def _fits(model: Model, config: ClusterConfig, memory_bytes: int, partitions: Pairs) -> bool:
    try:
        planned(model, config, memory_bytes, partitions=partitions)
    except LlamaclustError:
        return False
    return True


def test_workers_with_gpus_have_none(model: Model) -> None:
    gpus = (Gpu("cuda:0", "a GPU", 1 << 30, 1 << 30),)
    assert not planned(model, settings(), gpus=gpus).wide_tiles
    order = Load(
        1, "m.gguf", "0" * 64, 0, 2, replace(LIMITS, wide_tiles=True), None, devices=(DeviceLayers("cuda:0", 0, 2),)
    )
    with pytest.raises(ProtocolError, match="wide_tiles is for CPUs"):
        order.check()
    replace(order, devices=(DeviceLayers("cpu", 0, 2),)).check()


def test_a_model_without_such_types_is_planned_as_before(tmp_path: Path) -> None:
    with Model.open(build_tiny_model(tmp_path / "m.gguf", quant_type=QuantType.IQ2_S)) as other:
        assert not other.has_wider_tiles
        assert planned(other, settings()) == planned(other, settings(wide_tiles=False))


def test_stages_take_what_was_planned(model: Model) -> None:
    config = settings()
    plan = planned(model, config)
    backend, limits = CpuBackend(1), plan_limits(config, plan)
    assert plan.wide_tiles and limits.wide_tiles
    for stage in plan.stages:
        runner = StageRunner(backend, model.widened, stage.start, stage.end, limits)
        assert runner.memory.weight_bytes == stage.weight_bytes and runner.memory.kv_bytes == stage.kv_bytes
        assert runner.memory.workspace_bytes <= stage.workspace_bytes
        runner.close()


def test_a_plan_that_serves_is_predicted_by_its_tiles(model: Model) -> None:
    config = settings()
    plan = planned(model, config)
    one = WorkerResources(threads=1, free_memory_bytes=1 << 30, machine="", machine_free_bytes=0)
    workers = {worker.name: replace(one, machine=worker.name) for worker in config.workers}
    again = predict_served(config, model, ClusterResources(workers, dict.fromkeys(workers, profile())), plan)
    assert again is not None and plan.prediction is not None
    assert again.token_s == pytest.approx(plan.prediction.token_s)


def test_profiles_are_retimed_by_products(model: Model) -> None:
    config, cpu = settings(), profile().cpu
    own, wide = model_costs(config, model), model_costs(config, model.widened)
    assert retimed(cpu, own, own) == cpu
    other = retimed(cpu, own, wide)
    assert other.products == cpu.products and other.isolated_limits == cpu.isolated_limits
    for before, after in zip(cpu.concurrent + cpu.isolated, other.concurrent + other.isolated, strict=True):
        assert 0.4 * before.layers_byte_s < after.layers_byte_s < 0.8 * before.layers_byte_s
        assert (after.stage_s, after.rows) == (before.stage_s, before.rows) and after.head_s < before.head_s


@pytest.mark.parametrize("quant_type", WIDER_TILES, ids=lambda kind: kind.name)
def test_stages_compute_the_same_bits(tmp_path: Path, quant_type: QuantType) -> None:
    """Embedding and head have the type as well; one backend may hold both tile widths at once."""
    opened = Model.open(build_tiny_model(tmp_path / "m.gguf", quant_type=quant_type, layers=2))
    backend, limits, tokens = CpuBackend(2), replace(LIMITS, max_context_tokens=64), list(range(3, 40))
    own = Chain(backend, opened, (1,), limits)
    wide = Chain(backend, opened.widened, (1,), limits)
    for chunk in (None, 1, 5):
        np.testing.assert_array_equal(own.logits(tokens, chunk), wide.logits(tokens, chunk))
    own.close()
    wide.close()
