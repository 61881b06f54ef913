"""Tests of attention in 8-bit integers: the reference's rounding, and the error against unrounded attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.reference.byte_attention import round_queries
from llamaclust.model.architectures.positions import alibi_slopes
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import Attention
from support.arithmetic.attention_cases import (
    MAKERS,
    Float32,
    Model,
    assert_same_bits,
    chunks_of,
    in_float64,
    run_chunks,
)
from support.arithmetic.backends import all_threads
from support.arithmetic.conformance_cases import attention_case
from support.arithmetic.single_steps import Case, check_conformance, error, program_of

FEW_FLIPS = 1e-7
"""The largest error against the reference: a score's last bit may change the rounding of a weight."""
BOUNDS = [0, 150, 300, 450, 505, 511, 512, 513, 560, 600]


def in_int8(case: Case, **changes: object) -> Case:
    *copies, step = case.program.steps
    assert isinstance(step, Attention)
    changed = replace(step, kv_type=KvType.INT8, **changes)  # type: ignore[arg-type]
    program = program_of(case.program.hidden, case.program.out, *copies, changed)
    return replace(case, program=program)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((9, 3, 64), {}),
        ((2, 2, 40), {"window": 70}),
        ((20, 1, 32), {"soft_cap": 2.0}),
        ((3, 1, 33), {"slopes": alibi_slopes(3), "window": 530}),
        ((4, 2, 128), {"window": 100, "chunked": True}),
        ((2, 1, 96), {"causal": False}),
        ((6, 2, 2), {}),
    ],
)
def test_as_the_reference_has_it(tmp_path: Path, shape: tuple[int, int, int], changes: dict[str, object]) -> None:
    """Covers positions beyond a span, windows that begin within the 64 positions of a scale, and odd head sizes."""
    case = attention_case(*shape, [range(start, end) for start, end in itertools.pairwise(BOUNDS)])
    check_conformance(tmp_path, in_int8(case, **changes), FEW_FLIPS)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_near_what_is_not_rounded(tmp_path: Path, sharpness: float, make: Callable[[], CpuBackend]) -> None:
    """Tests nearly equal weights and weights of few positions: rounding queries and weights to 8 bits costs about as
    much as rounding keys and values."""
    model, plain = (Model(tmp_path, 4, 1, 64, kv_type) for kv_type in (KvType.INT8, KvType.F16))
    hidden = model.hidden(600)
    hidden[:, :256] *= np.float32(sharpness)
    with model.stage(make) as stage:
        found = run_chunks(stage, hidden, [range(600)])
    exact = in_float64(plain, hidden).astype(np.float32)
    assert error(found, exact) < 4 * error(in_float64(model, hidden).astype(np.float32), exact) < 2e-3


def test_queries_are_rounded_to_eight_bits() -> None:
    source = np.random.default_rng(5)
    queries: Float32 = source.standard_normal((3, 5, 72), np.float32) * np.float32(1e-3)
    queries[0, 0, :32] = 0
    queries[1, 1, 32:64] = 2.0**-110
    rounded = round_queries(queries)
    tops = np.abs(np.pad(queries, [(0, 0), (0, 0), (0, 24)]).reshape(3, 5, 3, 32)).max(axis=-1)
    errors = np.abs(np.pad(rounded - queries, [(0, 0), (0, 0), (0, 24)]).reshape(3, 5, 3, 32)).max(axis=-1)
    assert (errors <= tops / 253 + 2.0**-109).all()
    assert (rounded[1, 1, 32:64] == 0).all()
    assert (rounded[0, 0, :32] == 0).all()


@pytest.mark.parametrize("window", [None, 1, 63, 64, 65, 300])
def test_same_bits_however_positions_are_cut(tmp_path: Path, window: int | None) -> None:
    """Rows that are computed together attend to different parts of 64 positions."""
    model = Model(tmp_path, 3, 1, 72, KvType.INT8, window)
    hidden = model.hidden(640)
    with model.stage(partial(all_threads, 1)) as stage:
        wanted = run_chunks(stage, hidden, [range(640)])
    for make in MAKERS.values():
        with model.stage(make) as stage:
            for size in (1, 17, 64, 150):
                at = 0 if size > 1 else 560
                chunks = [range(at), *(range(at + c.start, at + c.stop) for c in chunks_of(640 - at, size))]
                assert_same_bits(run_chunks(stage, hidden, [c for c in chunks if len(c)]), wanted)


@pytest.mark.parametrize("scale", [1e-30, 3e-39, 1e4])
def test_values_of_any_magnitude(tmp_path: Path, scale: float) -> None:
    """Values whose scales underflow in float16 become zeros; large ones are kept."""
    model = Model(tmp_path, 2, 1, 32, KvType.INT8)
    hidden = model.hidden(130)
    hidden[:, -32:] *= np.float32(scale)
    hidden[::3, -32:] *= np.float32(1e-3)
    with model.stage(partial(all_threads, 2)) as stage:
        found = run_chunks(stage, hidden, [range(130)])
    wanted = in_float64(model, hidden).astype(np.float32)
    assert np.isfinite(found).all()
    if scale < 1:
        assert not wanted.any() and not found.any()
    else:
        assert error(found, wanted) < 1e-3
