"""Tests of steps between matrix products on every backend: activations, caps, gates and parts of rows; and attention
with soft-capped scores."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.kernels.reference.steps import State, gelu_erf, gelu_tanh, run_step
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.program import (
    Activate,
    Add,
    Attention,
    Buffer,
    Clamp,
    GaussianTopK,
    MatchMagnitude,
    MatMul,
    Mix,
    Moe,
    Mul,
    PositionScale,
    Program,
    RmsNorm,
    Scale,
    ScaleByWeight,
    SigmoidGate,
    Slice,
    SoftCap,
    Step,
)
from llamaclust.model.quant_types import QuantType
from llamaclust.model.steps.options import ActivationFunction, ExpertOptions
from support.arithmetic.backends import BACKENDS
from support.arithmetic.batches import batch_of
from support.arithmetic.conformance_cases import EXACT, attention_case, generator_of, moe_case
from support.arithmetic.single_steps import (
    Case,
    Weight,
    check_conformance,
    normal,
    program_of,
    rows_at,
    run_case,
    splitter,
)

Float32 = NDArray[np.float32]


def case_of(program: Program, weights: dict[str, Weight], hidden: list[Float32]) -> Case:
    return Case(program, weights, [(rows_at(range(len(part))), part) for part in hidden])


def spread(*parts: float) -> Float32:
    """Returns one row of 1024 numbers, uniform within +-`parts`, with zero and tiny numbers."""
    seed = zlib.crc32(repr(parts).encode())
    print("seed", seed)
    generator = np.random.default_rng(seed)
    values = np.concatenate([generator.uniform(-part, part, 1024 // len(parts)) for part in parts])
    values[:3] = 0, 1e-30, -1e-30
    return values.astype(np.float32)[None]


@pytest.mark.parametrize("kind", ActivationFunction)
@pytest.mark.parametrize("in_place", [True, False])
def test_activation_functions(tmp_path: Path, kind: ActivationFunction, in_place: bool) -> None:
    x, other = Buffer("x", 1024), Buffer("out", 1024)
    out = x if in_place else other
    hidden = [spread(0.1, 1, 5, 9), spread(200), normal(generator_of(kind), 33, 1024)]
    check_conformance(tmp_path, case_of(program_of(x, out, Activate(x, out, kind)), {}, hidden), 1e-13)


def test_the_kinds_of_gelu_differ() -> None:
    x = np.linspace(-4, 4, 100)
    assert gelu_erf(np.array([1.0]))[0] == pytest.approx(0.8413447460685429, rel=1e-15)
    assert gelu_tanh(np.array([1.0]))[0] == pytest.approx(0.8411919906082768, rel=1e-15)
    assert 1e-5 < np.abs(gelu_erf(x) - gelu_tanh(x)).max() < 1e-3


@pytest.mark.parametrize("cap", [1.0, 30.0, 50.0])
def test_soft_cap(tmp_path: Path, cap: float) -> None:
    """Small numbers hardly change; large numbers become the cap."""
    x, out = Buffer("x", 1024), Buffer("out", 1024)
    hidden = [spread(cap / 1e3), spread(cap, 4 * cap), spread(1e6)]
    check_conformance(tmp_path, case_of(program_of(x, out, SoftCap(x, out, cap)), {}, hidden), 1e-13)


def test_a_soft_cap_of_a_product_in_place(tmp_path: Path) -> None:
    """Shared logits are capped in place before other threads read them."""
    generator, x, logits, out = generator_of("cap"), Buffer("x", 64), Buffer("logits", 1000), Buffer("out", 1000)
    steps: list[Step] = [MatMul(x, logits, "w"), SoftCap(logits, logits, 2.0), Scale(logits, out, 3.0)]
    weights = {"w": Weight(normal(generator, 1000, 64))}
    hidden = [normal(generator, rows, 64) for rows in (1, 3, 40, 150)]
    check_conformance(tmp_path, case_of(program_of(x, out, *steps), weights, hidden), EXACT)
    check_conformance(tmp_path, case_of(program_of(x, logits, *steps[:2]), weights, hidden), EXACT)


@pytest.mark.parametrize("width", [16, 100, 512])
def test_products_and_factors(tmp_path: Path, width: int) -> None:
    x, a, b = Buffer("x", 2 * width), Buffer("a", width), Buffer("b", width)
    copies, weights = splitter(x, [a, b])
    steps: list[Step] = [*copies, Mul(a, b, a), Scale(b, b, math.sqrt(width)), Mul(a, b, b)]
    hidden = [normal(generator_of(width), rows, x.width) for rows in (1, 3, 40)]
    check_conformance(tmp_path, case_of(program_of(x, b, *steps), weights, hidden), EXACT)


def test_a_factor_of_the_file(tmp_path: Path) -> None:
    x = Buffer("x", 100)
    case = case_of(
        program_of(x, x, ScaleByWeight(x, x, "w")),
        {"w": Weight(np.array([0.3], np.float32))},
        [normal(generator_of(5), 9, 100)],
    )
    check_conformance(tmp_path, case, EXACT)


@pytest.mark.parametrize("limits", [(-0.5, 0.75), (-0.25, 2.0), (-2.0, np.inf), (-np.inf, 0.5)])
@pytest.mark.parametrize(("width", "in_place"), [(40, True), (100, False), (512, True)])
def test_clamps(tmp_path: Path, limits: tuple[float, float], width: int, in_place: bool) -> None:
    x, other = Buffer("x", width), Buffer("out", width)
    out = x if in_place else other
    weights = {name: Weight(np.array([limit], np.float32)) for name, limit in zip("ab", limits, strict=True)}
    hidden = [normal(generator_of(str(limits)), rows, width) for rows in (1, 9, 40)]
    check_conformance(tmp_path, case_of(program_of(x, out, Clamp(x, out, "a", "b")), weights, hidden), EXACT)


@pytest.mark.parametrize("name", BACKENDS)
def test_clamps_keep_what_is_not_a_number(name: str, tmp_path: Path) -> None:
    """Checks that numbers which are not finite are found after a clamp, so that their rows are computed again."""
    x, rows = Buffer("x", 40), np.zeros((2, 40), np.float32)
    rows[0, 3], rows[1, 39], rows[1, 0], rows[1, 1] = np.nan, np.nan, np.inf, -np.inf
    limits = {"a": Weight(np.array([-1.0], np.float32)), "b": Weight(np.array([2.0], np.float32))}
    write_gguf(tmp_path / "limits.gguf", {}, [limit.source(name) for name, limit in limits.items()])
    case = case_of(program_of(x, x, Clamp(x, x, "a", "b")), limits, [rows])
    (found,) = run_case(BACKENDS[name](), case, open_model(tmp_path / "limits.gguf").tensors)
    np.testing.assert_array_equal(np.argwhere(np.isnan(found)), [[0, 3], [1, 39]])
    assert (found[1, 0], found[1, 1], found[0, 0]) == (2, -1, 0)


@pytest.mark.parametrize("in_place", [True, False])
def test_scales_by_position(tmp_path: Path, in_place: bool) -> None:
    """The factor is 1 before `length` positions, then grows with each further length."""
    x, other = Buffer("x", 100), Buffer("out", 100)
    out = x if in_place else other
    hidden = [normal(generator_of(rows), rows, 100) for rows in (1, 7, 40)]
    case = case_of(program_of(x, out, PositionScale(x, out, 0.7, 8)), {}, hidden)
    check_conformance(tmp_path, case, 1e-14)
    state = State({}, {}, rows_at(range(40)))
    state[x] = np.ones((40, 100), np.float32)
    run_step(PositionScale(x, out, 0.7, 8), state)
    np.testing.assert_allclose(state[out][[0, 7, 8, 39], 0], [1, 1, 1 + 0.7 * math.log(2), 1 + 0.7 * math.log(5)])


def test_scales_by_position_with_an_offset(tmp_path: Path) -> None:
    """The first length ends `offset` positions earlier."""
    x, out = Buffer("x", 100), Buffer("out", 100)
    case = case_of(program_of(x, out, PositionScale(x, out, 0.7, 8, 1)), {}, [normal(generator_of(8), 40, 100)])
    check_conformance(tmp_path, case, 1e-14)
    state = State({}, {}, rows_at(range(40)))
    state[x] = np.ones((40, 100), np.float32)
    run_step(PositionScale(x, out, 0.7, 8, 1), state)
    np.testing.assert_allclose(state[out][[0, 6, 7, 39], 0], [1, 1, 1 + 0.7 * math.log(2), 1 + 0.7 * math.log(6)])


@pytest.mark.parametrize("start", [0, 16, 37, 80])
def test_slices(tmp_path: Path, start: int) -> None:
    x, out = Buffer("x", 100), Buffer("out", 20)
    hidden = [normal(generator_of(start), rows, 100) for rows in (1, 2, 40)]
    check_conformance(tmp_path, case_of(program_of(x, out, Slice(x, out, start)), {}, hidden), 0.0)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (5, 16), (3, 100), (8, 128)])
@pytest.mark.parametrize("weight", ["w", None])
def test_norms_of_heads(tmp_path: Path, heads: int, head_dim: int, weight: str | None) -> None:
    generator, x = generator_of(heads, head_dim), Buffer("x", heads * head_dim)
    loud = np.repeat(10.0 ** np.arange(heads), head_dim).astype(np.float32)
    hidden = [normal(generator, rows, x.width) * loud for rows in (1, 7, 33)]
    weights = {"w": Weight(normal(generator, head_dim))}
    check_conformance(tmp_path, case_of(program_of(x, x, RmsNorm(x, x, weight, 1e-6, heads)), weights, hidden), EXACT)


@pytest.mark.parametrize("width", [48, 576])
def test_sigmoid_gates(tmp_path: Path, width: int) -> None:
    generator = generator_of(width)
    x, a, b = Buffer("x", width + 64), Buffer("a", width), Buffer("b", 64)
    copies, weights = splitter(x, [a, b])
    weights["gate"] = Weight(normal(generator, width) * np.float32(2 / math.sqrt(width)))
    hidden = [normal(generator, rows, x.width) for rows in (1, 3, 40)]
    program = program_of(x, b, *copies, SigmoidGate(a, b, b, "gate"))
    check_conformance(tmp_path, case_of(program, weights, hidden), EXACT)


def split_case(parts: list[Buffer], out: Buffer, *steps: Step, rows: tuple[int, ...] = (1, 3, 40)) -> Case:
    """Builds a case of the steps over random `parts`, in private copies and shared buffers in turn."""
    x = Buffer("x", sum(part.width for part in parts))
    generator, (copies, weights) = generator_of(parts, steps), splitter(x, parts)
    first = Scale(parts[0], parts[0], 1.5)
    hidden = [normal(generator, count, x.width) for count in rows]
    return case_of(program_of(x, out, *copies, first, *steps), weights, hidden)


@pytest.mark.parametrize(("width", "x_parts", "parts"), [(64, 4, 4), (100, 1, 3), (37, 2, 1), (16, 5, 2)])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_mixed_parts(tmp_path: Path, width: int, x_parts: int, parts: int, in_place: bool, first: int) -> None:
    x, y, other = Buffer("from", x_parts * width), Buffer("to", parts * width), Buffer("out", parts * width)
    coefficients, out = Buffer("coefficients", x_parts * parts), y if in_place else other
    weighed = Mix(x, y, out, width, coefficients, 0.75, first)
    check_conformance(tmp_path, split_case([x, y, coefficients], out, weighed), EXACT)
    check_conformance(tmp_path, split_case([x, y], out, Mix(x, y, out, width, first=first)), EXACT)


def test_mixed_parts_are_sums_by_coefficients() -> None:
    """Each mixed part sums the parts of a row by its own coefficients; a part before the first one is copied."""
    x, y, coefficients = Buffer("x", 4), Buffer("y", 6), Buffer("coefficients", 6)
    state = State({}, {}, rows_at(range(1)))
    state[x], state[y] = np.array([[1, 2, 10, 20]], np.float32), np.array([[1, 1, 2, 2, 3, 3]], np.float32)
    state[coefficients] = np.array([[1, 2, 3, 4, 5, 6]], np.float32)
    run_step(Mix(x, y, y, 2, coefficients, 1.0, 1), state)
    np.testing.assert_array_equal(state[y], [[1, 1, 2 + 4 + 50, 2 + 8 + 100, 3 + 6 + 70, 3 + 12 + 140]])


@pytest.mark.parametrize(("width", "parts"), [(64, 3), (100, 1), (2, 5), (48, 9)])
@pytest.mark.parametrize("in_place", [True, False])
def test_magnitudes(tmp_path: Path, width: int, parts: int, in_place: bool) -> None:
    """Parts that are almost zero have the magnitude of the epsilon."""
    x, y, other = Buffer("from", parts * width), Buffer("like", width), Buffer("out", parts * width)
    out = x if in_place else other
    for epsilon in (1e-5, 0.5):
        check_conformance(tmp_path, split_case([x, y], out, MatchMagnitude(x, y, out, epsilon)), EXACT)
    state = State({}, {}, rows_at(range(1)))
    state[x] = np.concatenate([np.full((1, x.width - width), 7), np.full((1, width), 1e-3)], axis=1)
    state[y] = np.full((1, width), -2.0, np.float32)
    run_step(MatchMagnitude(x, y, out, 1e-4), state)
    wanted = np.concatenate([np.full((1, x.width - width), 2), np.full((1, width), 0.2)], axis=1)
    np.testing.assert_allclose(state[out], wanted, rtol=1e-6)


@pytest.mark.parametrize("width", [1, 16, 100, 1024])
@pytest.mark.parametrize("in_place", [True, False])
def test_activations_above_a_quantile(tmp_path: Path, width: int, in_place: bool) -> None:
    x, other = Buffer("from", width), Buffer("out", width)
    out = x if in_place else other
    for factor in (1.6448533535003662, -0.5) if width > 1 else (-0.5,):
        steps = GaussianTopK(x, out, factor), Add(out, Buffer("rest", width), out)
        check_conformance(tmp_path, split_case([x, Buffer("rest", width)], out, *steps), EXACT)


def test_a_twentieth_of_normal_numbers_is_left() -> None:
    x = Buffer("x", 20000)
    state = State({}, {}, rows_at(range(1)))
    state[x] = normal(generator_of("normal"), 1, 20000) * np.float32(3) + np.float32(5)
    before = state[x].copy()
    run_step(GaussianTopK(x, x, 1.6448533535003662), state)
    left = state[x] > 0
    assert 0.045 < left.mean() < 0.055 and before[left].min() > before[~left].max()
    np.testing.assert_allclose((before - state[x])[left], 5 + 3 * 1.645, rtol=0.02)


def test_factors_of_channels(tmp_path: Path) -> None:
    x, generator = Buffer("x", 100), generator_of("channels")
    program, hidden = program_of(x, x, ScaleByWeight(x, x, "w", by_channel=True)), [normal(generator, 9, 100)]
    check_conformance(tmp_path, case_of(program, {"w": Weight(normal(generator, 100))}, hidden), EXACT)


@pytest.mark.parametrize(("experts", "used"), [(3, 3), (40, 6)])
def test_experts_whose_weights_are_not_normalized(tmp_path: Path, experts: int, used: int) -> None:
    case = moe_case(QuantType.F16, experts, used, ffn=64)
    (step,) = case.program.steps
    assert isinstance(step, Moe)
    program = program_of(step.x, step.out, replace(step, options=ExpertOptions(normalized=False)))
    check_conformance(tmp_path, Case(program, case.weights, case.runs), EXACT)


@pytest.mark.parametrize("window", [None, 20, 600])
def test_attention_with_a_soft_cap(tmp_path: Path, window: int | None) -> None:
    """Covers chunks and single tokens, with scores up to ten times the cap."""
    case = attention_case(4, 2, 32, [range(0, 100), range(100, 101), range(101, 161)])
    *copies, step = case.program.steps
    assert isinstance(step, Attention)
    capped = replace(step, soft_cap=2.0, window=window)
    program = program_of(case.program.hidden, case.program.out, *copies, capped)
    runs = [(batch, hidden * np.float32(3)) for batch, hidden in case.runs if hidden is not None]
    check_conformance(tmp_path, Case(program, case.weights, runs), EXACT)
    alone = [(batch_of([([0], [0], [0])]), runs[0][1][:1])]
    check_conformance(tmp_path, Case(program, case.weights, alone), EXACT)
