"""Tests of consecutive rows that are merged or averaged in groups, such as those of image patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.backend import Float32
from llamaclust.model.program import Activate, Add, Attention, Buffer, MatMul, MeanRows, MergeRows, SelectRows, Step
from llamaclust.model.steps.options import ActivationFunction
from support.arithmetic.backends import BACKENDS
from support.arithmetic.batches import batch_of
from support.arithmetic.conformance_cases import EXACT, generator_of
from support.arithmetic.single_steps import LIMITS, Case, Weight, check_conformance, normal, program_of, rows_at

WIDTH = 64
X, MERGED, OUT = Buffer("x", WIDTH), Buffer("merged", 4 * WIDTH), Buffer("out", 40)
ROWS = (4, 8, 12, 16, 20, 64, 328)
"""Row counts before merging; threads have private copies of few rows, and share more rows, before or after merging."""


def run(name: str, hidden: Float32, *steps: Step) -> Float32:
    stage = BACKENDS[name]().load(program_of(X, steps[-1].out, *steps), {}, LIMITS, lambda done_bytes: None)
    out = stage.run(rows_at(range(len(hidden))), hidden).copy()
    stage.close()
    return out


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", BACKENDS)
def test_merged_rows_stand_one_after_the_other(name: str, rows: int) -> None:
    hidden = normal(generator_of(rows), rows, WIDTH)
    twice = Buffer("twice", WIDTH)
    found = run(name, hidden, Add(X, X, twice), MergeRows(twice, MERGED, 4), Add(MERGED, MERGED, MERGED))
    np.testing.assert_array_equal(found, 4 * hidden.reshape(rows // 4, 4 * WIDTH))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", BACKENDS)
def test_the_mean_is_a_sum_in_order(name: str, rows: int) -> None:
    hidden = normal(generator_of(rows), rows, WIDTH)
    mean = Buffer("mean", WIDTH)
    found = run(name, hidden, MeanRows(X, mean, 4))
    parts = hidden.reshape(rows // 4, 4, WIDTH)
    wanted = (((parts[:, 0] + parts[:, 1]) + parts[:, 2]) + parts[:, 3]) * np.float32(1 / 4)
    if name == "reference":
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("factor", [1, 2, 3, 9])
def test_products_of_merged_rows(tmp_path: Path, factor: int) -> None:
    """Two sequences have products before and after merging; the number of rows decreases twice."""
    generator = generator_of(factor)
    wide, mean, gate = (Buffer(name, factor * WIDTH) for name in ("wide", "mean", "gate"))
    inner = Buffer("inner", WIDTH)
    steps = (
        MatMul(X, inner, "a"),
        MergeRows(inner, wide, factor),
        Activate(wide, gate, ActivationFunction.GELU_QUICK),
        MeanRows(gate, mean, 2),
        MatMul(mean, OUT, "b"),
    )
    weights = {"a": Weight(normal(generator, WIDTH, WIDTH)), "b": Weight(normal(generator, 40, factor * WIDTH))}
    runs = []
    for first, second in ((2, 4), (6, 2), (12, 14)):
        counts = first * factor, second * factor
        batch = batch_of([([0] * count, range(count), range(20 * at, 20 * at + 20)) for at, count in enumerate(counts)])
        runs.append((batch, normal(generator, batch.rows, WIDTH)))
    check_conformance(tmp_path, Case(program_of(X, OUT, *steps), weights, runs), EXACT)


def test_what_does_not_fit_is_refused() -> None:
    five, hidden = Buffer("five", 5 * WIDTH), np.ones((12, WIDTH), np.float32)
    with pytest.raises(ValueError, match="number of rows before a sequence is 12, not a multiple of 5"):
        run("cpu-1-thread", hidden, MergeRows(X, five, 5))
    stage = BACKENDS["cpu-1-thread"]().load(program_of(X, MERGED, MergeRows(X, MERGED, 4)), {}, LIMITS, lambda _: None)
    with pytest.raises(ValueError, match="number of rows before a sequence is 6, not a multiple of 4"):
        stage.run(batch_of([([0] * 6, range(6), [0]), ([0] * 6, range(6), [1])]), hidden)
    mean = Buffer("mean", WIDTH)
    after = Attention(mean, mean, mean, X, 1, 1, 1, WIDTH, scale=1.0), SelectRows(mean, Buffer("few", WIDTH))
    for step in after:
        with pytest.raises(Exception, match="cannot be computed"):
            run("cpu-1-thread", hidden, MeanRows(X, mean, 4), step)
    with pytest.raises(Exception, match="merged rows of another width"):
        run("cpu-1-thread", hidden, MergeRows(X, five, 4))
