"""Tests of experts: rows that are grouped by expert have the bits of rows that are computed alone."""

from __future__ import annotations

import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.kernels._native import available_levels
from llamaclust.kernels.reference.backend import ReferenceBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.program import Buffer, Moe, RmsNorm
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.options import ExpertOptions, GatedActivation, Gating
from support.arithmetic.backends import all_threads
from support.arithmetic.conformance_cases import moe_case
from support.arithmetic.single_steps import (
    Case,
    Weight,
    check_conformance,
    error,
    normal,
    program_of,
    rows_at,
    run_case,
)

Float32 = NDArray[np.float32]

WIDTH, FFN, ROWS = 256, 320, 75
TYPES = [QuantType.F16, QuantType.Q4_1, QuantType.Q8_0, QuantType.MXFP4]
WAYS = [(level, 2) for level in available_levels()] + [(available_levels()[-1], threads) for threads in (1, 3, 5)]


def experts_of(folder: Path, quant_type: QuantType, router: Float32, used: int) -> tuple[Case, dict[str, Tensor]]:
    """Builds random experts with Q8_0 down weights, and runs the rows singly, in eights and all together."""
    experts, x, out = len(router), Buffer("x", WIDTH), Buffer("out", WIDTH)
    seed = zlib.crc32(repr((quant_type, experts, used)).encode())
    print("seed", seed)
    generator = np.random.default_rng(seed)
    weights = {
        "router": Weight(router),
        "gate": Weight(normal(generator, experts, FFN, WIDTH) / np.float32(16), quant_type),
        "up": Weight(normal(generator, experts, FFN, WIDTH) / np.float32(16), quant_type),
        "down": Weight(normal(generator, experts, WIDTH, FFN) / np.float32(16), QuantType.Q8_0),
    }
    path = folder / "experts.gguf"
    write_gguf(path, {}, [weight.source(name) for name, weight in weights.items()])
    hidden = normal(generator, ROWS, WIDTH)
    parts = [hidden[row : row + 1] for row in range(ROWS)] + np.split(hidden, range(8, ROWS, 8)) + [hidden]
    step = Moe(x, out, "router", "gate", "up", "down", experts, used, FFN)
    runs = [(rows_at(range(len(part))), part) for part in parts]
    return Case(program_of(x, out, step), weights, runs), dict(open_model(path).tensors)


def check(case: Case, tensors: dict[str, Tensor]) -> None:
    expected: Float32 | None = None
    for level, threads in WAYS:
        found = run_case(all_threads(threads, level), case, tensors)
        alone, eights, together = np.concatenate(found[:ROWS]), np.concatenate(found[ROWS:-1]), found[-1]
        expected = alone if expected is None else expected
        for rows in (alone, eights, together):
            np.testing.assert_array_equal(rows.view(np.uint32), expected.view(np.uint32), f"{level}, {threads} threads")
    assert expected is not None and len(np.unique(expected)) > expected.size // 2
    wanted = run_case(ReferenceBackend(), Case(case.program, case.weights, case.runs[-1:]), tensors)[0]
    assert error(expected, wanted) < 2e-4


@pytest.mark.parametrize(("experts", "used"), [(4, 2), (3, 3), (24, 5)])
@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_rows_together_have_the_bits_of_rows_alone(
    tmp_path: Path, quant_type: QuantType, experts: int, used: int
) -> None:
    router = normal(np.random.default_rng(experts), experts, WIDTH)
    check(*experts_of(tmp_path, quant_type, router / np.float32(16), used))


VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {"gating": Gating.SIGMOID, "scale": 2.5},
    "sigmoid not normalized": {"gating": Gating.SIGMOID, "normalized": False},
    "softmax of the chosen": {"gating": Gating.SOFTMAX_OF_CHOSEN, "normalized": False},
    "biased choice": {"gating": Gating.SIGMOID, "selection_bias": "selection bias"},
    "groups": {"gating": Gating.SIGMOID, "selection_bias": "selection bias", "groups": 4, "used_groups": 2},
    "groups of one expert": {"groups": 12, "used_groups": 7},
    "biases": {"router_bias": "router bias", "gate_bias": "gate bias", "up_bias": "up bias", "down_bias": "down bias"},
    "clamped": {"activation": GatedActivation.CLAMPED_SWIGLU, "gate_bias": "gate bias", "up_bias": "up bias"},
    "gelu": {"activation": GatedActivation.GELU_MUL},
    "fused": {"activation": GatedActivation.GELU_MUL, "fused": True, "gate": None, "up": "gate and up"},
    "scales": {"expert_scales": "expert scales"},
    "routed": {"routed": Buffer("routed", 256)},
    "weighed inputs": {"gating": Gating.SIGMOID, "normalized": False, "weighs_inputs": True},
    "weighed inputs with biases": {"weighs_inputs": True, "gate_bias": "gate bias", "down_bias": "down bias"},
}
EXPERTS, USED, INNER = 12, 3, 64


def variant_of(options: dict[str, Any]) -> Case:
    case = moe_case(QuantType.F16, EXPERTS, USED, INNER)
    (step,) = case.program.steps
    assert isinstance(step, Moe)
    generator = np.random.default_rng(3)
    sizes = {"router bias": (EXPERTS,), "selection bias": (EXPERTS,), "gate bias": (EXPERTS, INNER)}
    sizes |= {"up bias": (EXPERTS, INNER), "down bias": (EXPERTS, 256), "expert scales": (EXPERTS,)}
    named = {name: Weight(3 * normal(generator, *size)) for name, size in sizes.items() if name in options.values()}
    named["router"] = Weight(case.weights["router"].values / np.float32(64))  # keeps sigmoids below 1
    halves = [case.weights[name].values for name in ("gate", "up")]
    named["gate and up"] = Weight(np.concatenate(halves, axis=1), QuantType.F16)
    names = {field.name for field in fields(ExpertOptions)}
    biases = {key: value for key, value in options.items() if key not in names}
    chosen = ExpertOptions(**{key: value for key, value in options.items() if key in names})
    step = replace(step, options=chosen, **biases)
    mixed = () if step.routed is None else (RmsNorm(step.x, step.routed, None, 1e-5, heads=16),)
    return Case(program_of(step.x, step.out, *mixed, step), {**case.weights, **named}, case.runs)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_those_of_the_reference(tmp_path: Path, name: str) -> None:
    check_conformance(tmp_path, variant_of(VARIANTS[name]), 1e-7)


COUNTING = [
    ("sigmoid", ("gating",)),
    ("sigmoid", ("scale",)),
    ("sigmoid not normalized", ("normalized",)),
    ("softmax of the chosen", ("gating",)),
    ("biased choice", ("selection_bias",)),
    ("groups", ("groups", "used_groups")),
    *(("biases", (part,)) for part in VARIANTS["biases"]),
    ("clamped", ("activation",)),
    ("gelu", ("activation",)),
    ("scales", ("expert_scales",)),
    ("routed", ("routed",)),
]


@pytest.mark.parametrize(("name", "omitted"), COUNTING, ids=str)
def test_each_option_counts(tmp_path: Path, name: str, omitted: tuple[str, ...]) -> None:
    """The reference's result differs without the option."""
    whole, path = variant_of(VARIANTS[name]), tmp_path / "experts.gguf"
    write_gguf(path, {}, [weight.source(weight_name) for weight_name, weight in whole.weights.items()])
    tensors = open_model(path).tensors
    other = variant_of({key: value for key, value in VARIANTS[name].items() if key not in omitted})
    wanted, found = (run_case(ReferenceBackend(), case, tensors)[-1] for case in (whole, other))
    assert max(map(error, found, wanted)) > 1e-4  # the largest error of a row


def test_a_fused_gate_has_the_bits_of_two_tensors(tmp_path: Path) -> None:
    path, backend = tmp_path / "experts.gguf", all_threads(2)
    whole, apart = (variant_of(VARIANTS[name]) for name in ("fused", "gelu"))
    write_gguf(path, {}, [weight.source(name) for name, weight in {**whole.weights, **apart.weights}.items()])
    for found, wanted in zip(
        *(run_case(backend, case, open_model(path).tensors) for case in (whole, apart)), strict=True
    ):
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


def test_all_rows_may_choose_the_same_experts(tmp_path: Path) -> None:
    check(*experts_of(tmp_path, QuantType.Q4_1, np.zeros((6, WIDTH), np.float32), 2))


def test_rows_whose_router_gives_no_numbers_leave_others_alone(tmp_path: Path) -> None:
    """A row of NaN selects one expert at every rank, so an expert may have more lines than there are rows."""
    router = normal(np.random.default_rng(1), 4, WIDTH) / np.float32(16)
    case, tensors = experts_of(tmp_path, QuantType.Q8_0, router, 3)
    hidden = case.runs[-1][1]
    assert hidden is not None
    poisoned = hidden.copy()
    poisoned[1::2] = np.nan
    runs = [(rows_at(range(ROWS)), rows) for rows in (hidden, poisoned)]
    for level, threads in WAYS:
        sane, found = run_case(all_threads(threads, level), Case(case.program, case.weights, runs), tensors)
        assert np.isnan(found[1::2]).all()
        np.testing.assert_array_equal(found[::2].view(np.uint32), sane[::2].view(np.uint32))
