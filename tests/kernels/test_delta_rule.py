"""Tests of the gated delta rule: backends against the reference, in chunks, for many shapes of heads."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.backend import Float32
from llamaclust.model.program import Activate, Buffer, Program, RmsNorm, Scale
from llamaclust.model.steps.options import ActivationFunction
from llamaclust.model.steps.states import Decay, DeltaRule
from support.arithmetic.conformance_cases import EXACT, generator_of
from support.arithmetic.single_steps import Case, Weight, check_conformance, normal, program_of, rows_at, splitter

CHUNKS = (range(1), range(1, 3), range(3, 16), range(16, 17), range(17, 70), range(70, 96), range(96, 97))
"""Chunks within KV blocks and at their borders; the state continues across them."""


def delta_rule(
    shape: tuple[int, int], channels: tuple[int, int], *, per_key: bool, tiled: bool
) -> tuple[Program, dict[str, Weight]]:
    """Builds a delta rule with values as in models: unit keys and queries, decays and betas between 0 and 1."""
    (heads, key_heads), (keys, values) = shape, channels
    q, k = (Buffer(name, key_heads * keys) for name in ("q", "k"))
    v, out = (Buffer(name, heads * values) for name in ("v", "out"))
    decay, beta = Buffer("decay", heads * (keys if per_key else 1)), Buffer("beta", heads)
    parts = [q, k, v, decay, beta]
    x = Buffer("x", sum(part.width for part in parts))
    generator = generator_of(*shape, *channels)
    copies, weights = splitter(x, parts)
    weights["a"] = Weight(generator.uniform(-0.5, -0.01, heads).astype(np.float32))
    weights["dt"] = Weight(normal(generator, decay.width))
    unit = 1 / math.sqrt(keys)
    steps = (
        *(step for part in (q, k) for step in (RmsNorm(part, part, None, 1e-6, key_heads), Scale(part, part, unit))),
        Decay(decay, decay, "a", "dt", heads),
        Activate(beta, beta, ActivationFunction.SIGMOID),
        DeltaRule(q, k, v, decay, beta, out, 1, heads, key_heads, tiled),
    )
    return program_of(x, out, *copies, *steps), weights


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize(
    ("shape", "channels", "tiled"),
    [
        ((1, 1), (1, 16), False),
        ((4, 2), (16, 16), False),
        ((4, 2), (16, 16), True),
        ((3, 3), (24, 48), True),
        ((6, 2), (7, 80), False),
        ((2, 1), (256, 32), True),
    ],
)
def test_chunks_of_it_are_those_of_the_reference(
    tmp_path: Path, shape: tuple[int, int], channels: tuple[int, int], tiled: bool, per_key: bool
) -> None:
    """Heads of 16 to 80 channels are computed 32 and 16 at a time; all levels and thread counts give equal bits."""
    program, weights = delta_rule(shape, channels, per_key=per_key, tiled=tiled)
    generator = generator_of(*shape, *channels, per_key)
    runs = [(rows_at(positions), normal(generator, len(positions), program.hidden.width)) for positions in CHUNKS]
    check_conformance(tmp_path, Case(program, weights, runs), EXACT)


def spread(seed: int) -> Float32:
    """Returns numbers over a range in which exp underflows and overflows."""
    generator = np.random.default_rng(seed)
    parts = [generator.uniform(-limit, limit, 256) for limit in (0.1, 4.0, 30.0, 300.0)]
    return np.concatenate(parts).astype(np.float32)[None]


def test_decays(tmp_path: Path) -> None:
    """Far below 0, softplus is 0; far above, softplus(x) is x. The step has two heads."""
    seed = zlib.crc32(b"decays")
    print("seed", seed)
    x, out = Buffer("x", 1024), Buffer("out", 1024)
    weights = {
        "a": Weight(np.array([-0.02, -0.3], np.float32)),
        "dt": Weight(normal(np.random.default_rng(seed), 1024)),
    }
    case = Case(program_of(x, out, Decay(x, out, "a", "dt", 2)), weights, [(rows_at(range(1)), spread(seed))])
    check_conformance(tmp_path, case, 1e-13)
