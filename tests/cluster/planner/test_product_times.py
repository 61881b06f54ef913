"""Tests steps without measurements: products take the time of their quant type, measured or assumed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.product_times import RATES, READ_SHARE, ProductTimes
from llamaclust.cluster.planner.roofline import LAUNCHES_S, LAYER_S, ROW_MACS
from llamaclust.core.errors import ProtocolError
from llamaclust.core.profile import DeviceProfile, Limits, ProductTime, Profile, mean_profile
from llamaclust.core.sizes import MIB
from llamaclust.kernels import _native
from llamaclust.model.costs import LayerCost, ModelCosts, TypedWeights
from llamaclust.model.quant_types import QuantType
from support.plans.plan_inputs import profile, step_time
from support.seed import SEED

SLOW, FAST = QuantType.IQ1_S, QuantType.Q4_K
TIMES = (
    *(ProductTime(FAST, rows, byte_s) for rows, byte_s in ((1, 50e-12), (8, 60e-12), (128, 660e-12))),
    *(ProductTime(SLOW, rows, byte_s) for rows, byte_s in ((1, 200e-12), (8, 270e-12), (128, 1470e-12))),
)
MEASURED = replace(profile(20, 300), products=TIMES)


def layer(*weights: TypedWeights) -> LayerCost:
    """Makes a layer with the bytes and products of these weights, and 4 KiB of norms."""
    n_bytes, macs = sum(each.n_bytes for each in weights), sum(each.macs for each in weights)
    return LayerCost(n_bytes + 4096, macs, 1024, weights=weights)


FAST_LAYER, SLOW_LAYER = (layer(TypedWeights(kind, 10 * MIB, 20_000_000)) for kind in (FAST, SLOW))
HEAD = TypedWeights(FAST, 20 * MIB, 40_000_000)
MODEL = ModelCosts(0, 20 * MIB, 40_000_000, (FAST_LAYER, SLOW_LAYER) * 4, head_weights=(HEAD,))
NORMS_S = 4096 / 20e9


def worker(device: DeviceProfile, name: str = "cpu") -> WorkerFacts:
    return WorkerFacts("a", None, device, device=name)


def test_each_type_takes_its_own_time_for_few_rows_and_for_many() -> None:
    stages = StageCosts.of(MODEL)
    for rows, fast, slow in ((1, 50e-12, 200e-12), (8, 60e-12, 270e-12), (68, 360e-12, 870e-12)):
        fast_s, slow_s = 10 * MIB * fast + LAYER_S + NORMS_S, 10 * MIB * slow + LAYER_S + NORMS_S
        assert stages.decode_s(worker(MEASURED), 0, 1, rows) == pytest.approx(fast_s)
        assert stages.decode_s(worker(MEASURED), 1, 2, rows) == pytest.approx(slow_s)
        assert stages.prefill_s(worker(MEASURED), 0, 8, rows) == pytest.approx(4 * (fast_s + slow_s))
        assert stages.decode_s(worker(MEASURED), 0, 8, rows) == pytest.approx(4 * (fast_s + slow_s) + 20 * MIB * fast)


def test_rows_take_time_beside_products_by_their_width() -> None:
    for rows in (1, 128):
        narrow, wide = (
            StageCosts.of(replace(MODEL, hidden_bytes=hidden_bytes)).prefill_s(worker(MEASURED), 0, 2, rows)
            for hidden_bytes in (0, 8192)
        )
        assert wide - narrow == pytest.approx(2 * rows * 2048 * ROW_MACS / 300e9)


def test_measured_steps_of_the_model_come_first() -> None:
    steps = (step_time(1, 0.2, 30.0, 1.0), step_time(8, 0.3, 90.0, 1.4))
    stages, tried = StageCosts.of(MODEL), replace(MEASURED, concurrent=steps)
    assert stages.decode_s(worker(tried), 1, 2) == pytest.approx(0.2e-3 + SLOW_LAYER.weight_bytes * 30e-12)


def test_products_of_idle_and_of_busy_machines() -> None:
    idle = tuple(replace(time, byte_s=time.byte_s / 2) for time in TIMES)
    both, stages = worker(replace(MEASURED, isolated_products=idle)), StageCosts.of(MODEL)
    busy_s, idle_s = (stages.decode_s(both, 1, 2, concurrent=concurrent) for concurrent in (True, False))
    assert busy_s - idle_s == pytest.approx(10 * MIB * 100e-12)
    assert stages.decode_s(worker(MEASURED), 1, 2) == pytest.approx(busy_s), "idle machines were not measured"


def test_limits_of_idle_machines() -> None:
    """The limits apply to work beside products, and to types without measurements."""
    idle = replace(profile(20, 300), isolated_limits=Limits(40e9, 600e9))
    stages = StageCosts.of(replace(MODEL, hidden_bytes=8192))
    for rows in (1, 128):
        found = [stages.decode_s(worker(each), 0, 4, rows) for each in (idle, profile(40, 600))]
        assert found[0] == pytest.approx(found[1])
    busy = [stages.decode_s(worker(each), 0, 4, concurrent=True) for each in (idle, profile(20, 300))]
    assert busy[0] == pytest.approx(busy[1])


def test_products_of_an_idle_machine_come_before_steps_of_a_busy_one() -> None:
    steps = (step_time(1, 0.2, 300.0, 1.0), step_time(8, 0.3, 900.0, 1.4))
    both = worker(replace(MEASURED, concurrent=steps, isolated_products=TIMES))
    stages = StageCosts.of(MODEL)
    assert stages.decode_s(both, 1, 2) == stages.decode_s(worker(MEASURED), 1, 2)
    assert stages.decode_s(both, 1, 2, concurrent=True) == pytest.approx(0.2e-3 + SLOW_LAYER.weight_bytes * 300e-12)


def test_experts_have_products_with_the_rows_that_choose_them() -> None:
    """A row chooses eight of 32 experts, so each expert has a quarter of the rows once all are read."""
    experts = TypedWeights(SLOW, 32 * MIB, 16_000_000)
    mixture = replace(
        FAST_LAYER,
        weight_bytes=FAST_LAYER.weight_bytes + 33 * MIB,
        macs_per_token=FAST_LAYER.macs_per_token + 16_500_000,
        idle_bytes=24 * MIB,
        idle_share=0.75,
        expert_bytes=33 * MIB,
        expert_macs_per_token=16_500_000,
        expert_weights=(experts,),
    )
    stages = StageCosts.of(ModelCosts(0, 0, 0, (mixture,)))
    rest_s = 10 * MIB * 50e-12 + LAYER_S + NORMS_S
    router_s = MIB / 20e9
    assert stages.decode_s(worker(MEASURED), 0, 1) == pytest.approx(8 * MIB * 200e-12 + rest_s + router_s)
    found = stages.experts_table(worker(MEASURED), 512, np.array([True]))[0, 1]
    assert found == pytest.approx(32 * MIB * 1470e-12 + 512 * 500_000 / 300e9)
    two = stages.experts_table(worker(MEASURED), 2, np.array([True]))[0, 1]
    share, each = 1 - 0.75**2, 0.5 / (1 - 0.75**2)
    assert two == pytest.approx(32 * MIB * share * (200 + (each - 1) * 10) * 1e-12 + router_s)


def test_gpus_take_what_their_kernels_reach_whatever_the_type() -> None:
    stages = StageCosts.of(MODEL)
    for number in (0, 1):
        n_bytes = MODEL.layers[number].weight_bytes
        assert stages.decode_s(worker(MEASURED, "cuda:0"), number, number + 1) == pytest.approx(
            n_bytes / 20e9 + LAUNCHES_S
        )


def test_what_was_not_measured_is_assumed_from_the_machines_limits() -> None:
    """Weights are read at a share of the bandwidth or as fast as they are decoded; many rows at a share of the peak."""
    times = ProductTimes.of(profile(10, 1e6), concurrent=False)
    for kind in RATES:
        assert times.byte_s(kind, 1) == pytest.approx(1 / (READ_SHARE * 10e9)), "products take no time"
    weights = 256 / 62  # in memory a block of IQ1_S has 12 bytes more than in the file
    rates, slow = RATES[SLOW], ProductTimes.of(profile(1e6, 100), concurrent=False)
    assert slow.byte_s(SLOW, 1) == pytest.approx(weights * (rates.decode_macs + 1 / rates.peak_share) / 100e9)
    many = slow.byte_s(SLOW, 513) - slow.byte_s(SLOW, 1)
    assert many == pytest.approx(512 * weights / rates.peak_share / 100e9)
    partly = ProductTimes.of(replace(profile(10, 100), products=TIMES[:3]), concurrent=False)
    assert partly.byte_s(FAST, 1) == 50e-12
    assert partly.byte_s(SLOW, 1) == ProductTimes.of(profile(10, 100), concurrent=False).byte_s(SLOW, 1)


def test_every_type_that_can_be_computed_with_has_assumed_rates() -> None:
    assert {*map(QuantType, _native.quant_types())} == RATES.keys()


def test_more_rows_never_take_less() -> None:
    source = np.random.default_rng(SEED)
    measured, assumed = (ProductTimes.of(each, concurrent=True) for each in (MEASURED, profile(20, 300)))
    for kind in (FAST, SLOW):
        for times in (measured, assumed):
            rows = np.sort(source.uniform(1, 600, 50))
            found = [times.byte_s(kind, count) for count in rows]
            assert found == sorted(found)


def test_times_are_kept_of_types_that_another_model_has() -> None:
    other = (ProductTime(FAST, 1, 9e-12), ProductTime(QuantType.Q8_0, 1, 7e-12))
    known = Profile(replace(profile(), products=other))
    kept = Profile(MEASURED).with_other_products(known).cpu
    assert kept.products == (other[1], *TIMES)
    kept.check()
    with pytest.raises(ProtocolError, match="must be in ascending order"):
        replace(MEASURED, products=TIMES[::-1]).check()
    with pytest.raises(ProtocolError, match="must be in ascending order"):
        replace(MEASURED, isolated_products=TIMES[:1] * 2).check()


def test_equal_workers_have_the_mean_of_their_times() -> None:
    halved = replace(MEASURED, products=tuple(replace(time, byte_s=time.byte_s / 2) for time in TIMES[:3]))
    found = mean_profile([Profile(MEASURED), Profile(halved)]).cpu.products
    assert [time.byte_s for time in found[:3]] == pytest.approx([0.75 * time.byte_s for time in TIMES[:3]])
    assert found[3:] == TIMES[3:]
