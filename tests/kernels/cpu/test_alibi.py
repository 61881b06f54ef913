"""Tests of attention with ALiBi biases: close to float64 and the reference, with equal bits in any chunks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llamaclust.core.errors import ModelFileError
from llamaclust.model.architectures.positions import alibi_slopes
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Attention
from support.arithmetic.attention_cases import (
    ERRORS,
    MAKERS,
    Model,
    assert_same_bits,
    chunks_of,
    in_float64,
    run_chunks,
)
from support.arithmetic.backends import all_threads
from support.arithmetic.batches import batch_of
from support.arithmetic.conformance_cases import EXACT, attention_case
from support.arithmetic.single_steps import Case, check_conformance, error, program_of


def test_slopes_are_powers_of_two_with_others_between() -> None:
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(1) == (2.0**-8,)
    wanted = [*(2 ** (-2 * (h + 1)) for h in range(4)), *(2 ** (-(2 * h + 1)) for h in range(2))]
    assert alibi_slopes(6) == tuple(wanted)
    found = alibi_slopes(40)
    wanted = [*(2 ** (-(h + 1) / 4) for h in range(32)), *(2 ** (-(2 * h + 1) / 8) for h in range(8))]
    np.testing.assert_allclose(found, wanted, rtol=2.0**-23)
    assert all(float(np.float32(slope)) == slope for slope in found)


def biased(folder: Path, shape: tuple[int, int, int], kv_type: KvType, window: int | None = None) -> Model:
    return Model(folder, *shape, kv_type, window, alibi_slopes(shape[0]))


@pytest.mark.parametrize(("shape", "window"), [((6, 3, 16), None), ((6, 6, 16), 540), ((72, 1, 8), None)])
@pytest.mark.parametrize("kv_type", KvType)
def test_close_to_float64(tmp_path: Path, kv_type: KvType, shape: tuple[int, int, int], window: int | None) -> None:
    """Covers positions beyond a span, and a group's heads in two units of work."""
    model = biased(tmp_path, shape, kv_type, window)
    hidden = model.hidden(70 if shape[0] == 72 else 570)
    wanted = in_float64(model, hidden).astype(np.float32)
    with model.stage(partial(all_threads, 2)) as stage:
        found = run_chunks(stage, hidden, [range(len(hidden))])
    assert error(found, wanted) < ERRORS[kv_type]
    assert error(in_float64(replace(model, slopes=None), hidden).astype(np.float32), wanted) > 0.1


@pytest.mark.parametrize(("kv_type", "window"), [(KvType.F16, None), (KvType.Q8_0, 520)])
def test_same_bits_in_any_chunks_on_any_level_and_threads(tmp_path: Path, kv_type: KvType, window: int | None) -> None:
    """Covers prefill, and decoding over several spans, which are computed on different threads."""
    model = biased(tmp_path, (6, 3, 16), kv_type, window)
    hidden = model.hidden(1100)
    ones = [range(i, i + 1) for i in (*range(505, 515), *range(1020, 1030))]
    mixed = [*chunks_of(505, 170), *ones[:10], range(515, 1020), *ones[10:], range(1030, 1037), range(1037, 1100)]
    with model.stage(partial(all_threads, 1)) as stage:
        wanted = run_chunks(stage, hidden, [range(1100)])
    for make in MAKERS.values():
        with model.stage(make) as stage:
            assert_same_bits(run_chunks(stage, hidden, chunks_of(1100, 63)), wanted)
            assert_same_bits(run_chunks(stage, hidden, mixed), wanted)


def test_same_bits_beside_another_sequence(tmp_path: Path) -> None:
    model = biased(tmp_path, (6, 3, 16), KvType.F16)
    hidden = model.hidden(600)
    with model.stage(partial(all_threads, 2)) as stage:
        wanted = run_chunks(stage, hidden, [range(600)])
        run_chunks(stage, hidden, [range(590)])
        run_chunks(stage, hidden, [range(20)], range(40, 50))
        batch = batch_of([([0] * 10, range(590, 600), range(40)), ([0], [20], range(40, 50))], outputs=[])
        found = stage.run(batch, np.concatenate([hidden[590:], hidden[20:21]]))
        assert_same_bits(found, np.concatenate([wanted[590:], wanted[20:21]]))


@pytest.mark.parametrize(("cap", "window"), [(None, None), (2.0, 520)])
def test_as_the_reference_has_it(tmp_path: Path, cap: float | None, window: int | None) -> None:
    """Covers positions beyond a span; the bias is added after a soft cap."""
    bounds = [0, 150, 300, 450, 511, 512, 513, 600]
    case = attention_case(6, 3, 16, [range(start, end) for start, end in itertools.pairwise(bounds)])
    *copies, step = case.program.steps
    assert isinstance(step, Attention)
    step = replace(step, slopes=alibi_slopes(6), soft_cap=cap, window=window)
    program = program_of(case.program.hidden, case.program.out, *copies, step)
    check_conformance(tmp_path, Case(program, case.weights, case.runs), EXACT)


@pytest.mark.parametrize(
    ("slopes", "what"), [((0.5,) * 5, "a slope for each head"), ((0.5,) * 5 + (float("inf"),), "no number")]
)
def test_slopes_that_are_refused(tmp_path: Path, slopes: tuple[float, ...], what: str) -> None:
    model = Model(tmp_path, 6, 3, 16, slopes=slopes)
    with pytest.raises(ModelFileError, match=what), model.stage(partial(all_threads, 1)):
        pass
