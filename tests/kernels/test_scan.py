"""Tests of Mamba 2's scans and grouped norms: the reference's results in any chunks, and two states per layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import kv_bytes
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.scan import scan
from llamaclust.kernels.reference.states import SequenceRows
from llamaclust.model.loader import Model
from llamaclust.model.program import Buffer, Program, RmsNorm, Scan, SequenceState, Slice, StatePart
from support.arithmetic.batches import batch_of, load_stage
from support.arithmetic.conformance_cases import EXACT, generator_of
from support.arithmetic.single_steps import Case, Weight, check_conformance, normal, program_of, rows_at
from support.models.tiny_architectures import VOCABULARY, build_architecture

LIMITS = StageLimits(max_batch_tokens=128, max_outputs=128, max_sequences=4, max_context_tokens=256, kv_blocks=40)
CHUNKS = [range(1), range(1, 3), range(3, 16), range(16, 17), range(17, 70), range(70, 96), range(96, 97)]


def scan_of(heads: int, channels: int, groups: int, state_size: int) -> tuple[Program, dict[str, Weight]]:
    """Builds a program that scans its hidden state (the channels of x, then dt), and the program's weights."""
    generator, inner = generator_of(heads, channels, groups, state_size), heads * channels
    x, dt = Buffer("x", inner + 2 * groups * state_size), Buffer("dt", heads)
    hidden, out = Buffer("hidden", x.width + dt.width), Buffer("out", inner)
    steps = Slice(hidden, x, 0), Slice(hidden, dt, x.width), Scan(x, dt, out, "bias", "decay", "skip", groups, 1)
    weights = {
        "bias": Weight(normal(generator, heads)),
        "decay": Weight(-np.abs(normal(generator, heads, 1))),
        "skip": Weight(normal(generator, heads, 1)),
    }
    return program_of(hidden, out, *steps), weights


@pytest.mark.parametrize(
    ("heads", "channels", "groups", "state_size"), [(1, 16, 1, 1), (4, 64, 1, 128), (6, 24, 3, 20), (16, 5, 4, 16)]
)
def test_scans_are_those_of_the_reference(
    tmp_path: Path, heads: int, channels: int, groups: int, state_size: int
) -> None:
    """Chunks end within blocks and at their borders, and continue the state of earlier chunks."""
    program, weights = scan_of(heads, channels, groups, state_size)
    generator = generator_of("rows", heads)
    runs = [(rows_at(positions), normal(generator, len(positions), program.hidden.width)) for positions in CHUNKS]
    check_conformance(tmp_path, Case(program, weights, runs), EXACT)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_steps_of_any_length(tmp_path: Path, scale: float) -> None:
    """Far above zero, a step's length is dt; far below, it is almost zero."""
    program, weights = scan_of(8, 16, 2, 16)
    hidden = normal(generator_of("long", scale), 64, program.hidden.width)
    hidden[:, -8:] *= scale
    check_conformance(tmp_path, Case(program, weights, [(rows_at(range(64)), hidden)]), EXACT)


def test_a_scan_by_its_formula() -> None:
    """The scan has two heads of one channel and a state of two numbers."""
    x, dt, out = Buffer("x", 6), Buffer("dt", 2), Buffer("out", 2)
    bias, decay, skip = [0.5, -1.0], [-0.5, -2.0], [0.25, 3.0]
    weights = {"bias": bias, "decay": decay, "skip": skip}
    rows = np.array([[1, 2, 0.5, -1, 2, 3, 0.1, 0.2], [3, -1, 1, 1, -2, 0.5, -0.3, 1.5]], np.float32)
    state, wanted = np.zeros((2, 2)), np.zeros((2, 2))
    for row, (*inputs, b1, b2, c1, c2, dt1, dt2) in enumerate(rows.tolist()):
        for head, (number, time) in enumerate(zip(inputs, (dt1, dt2), strict=True)):
            step = math.log1p(math.exp(time + bias[head]))
            state[head] = state[head] * math.exp(step * decay[head]) + np.array([b1, b2]) * number * step
            wanted[row, head] = state[head] @ [c1, c2] + number * skip[head]
    rows_of_memory = SequenceRows(range(2), np.full((1, 4), np.nan, np.float32), None, {1: 0})
    found = scan(
        Scan(x, dt, out, "bias", "decay", "skip", groups=1, layer=0),
        rows[:, :6],
        rows[:, 6:],
        {name: np.array(numbers, np.float32) for name, numbers in weights.items()},
        iter([rows_of_memory]),
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(("groups", "width"), [(1, 64), (4, 24), (8, 128)])
def test_norms_of_groups_with_weights_of_their_own(tmp_path: Path, groups: int, width: int) -> None:
    x, generator = Buffer("x", groups * width), generator_of("norm", groups)
    weights = {"weight": Weight(normal(generator, groups, width))}
    step = RmsNorm(x, x, "weight", 1e-5, groups, own_weights=True)
    runs = [(rows_at(range(rows)), normal(generator, rows, x.width)) for rows in (1, 3, 40)]
    check_conformance(tmp_path, Case(program_of(x, x, step), weights, runs), EXACT)


@pytest.fixture(scope="module", params=["granitehybrid", "falcon-h1", "nemotron_h"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = build_architecture(tmp_path_factory.mktemp("scan") / f"{request.param}.gguf", request.param)
    with Model.open(path) as model:
        yield model


def random_tokens(count: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCABULARY, count)]


def test_sequences_of_one_batch_have_states_of_their_own(model: Model) -> None:
    """Sequences with a common prefix continue its state in separate blocks."""
    first, second = random_tokens(60, 3), random_tokens(60, 4)
    second[:32] = first[:32]
    stage, alone = load_stage(CpuBackend(3), model, limits=LIMITS), load_stage(CpuBackend(1), model, limits=LIMITS)
    stage.run(batch_of([(first[:40], range(40), [9, 4, 7])]), None)
    both = batch_of([(second[32:50], range(32, 50), [9, 4, 1, 2]), (first[40:60], range(40, 60), [9, 4, 7, 3])])
    found = stage.run(both, None).copy()
    wanted = [alone.run(batch_of([(tokens, range(60), [0, 1, 2, 3])]), None).copy() for tokens in (second, first)]
    assert found.tobytes() == np.concatenate([wanted[0][32:50], wanted[1][40:60]]).tobytes()


def test_layers_keep_a_state_of_each_part(model: Model) -> None:
    """The stage allocates as many KV bytes as `kv_bytes` counts."""
    program = model.program(0, model.layer_count)
    states = [kept for kept in program.kv_memory if isinstance(kept, SequenceState)]
    assert len({(state.layer, state.part) for state in states}) == len(states)
    assert {state.part for state in states} == {StatePart.CONVOLUTION, StatePart.RECURRENCE}
    stage = load_stage(CpuBackend(1), model, limits=LIMITS)
    assert stage.kv_bytes == kv_bytes(program, LIMITS)
