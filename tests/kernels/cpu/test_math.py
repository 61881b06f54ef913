"""Tests of exp, log, sine and cosine: error bounds, special values, and equal bits at every feature level."""

from __future__ import annotations

import hashlib
import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.kernels import _native

LEVELS = _native.available_levels()


def exp(x: NDArray[np.float32], level: str) -> NDArray[np.float32]:
    out = np.empty_like(x)
    _native.exp(x, out, level)
    return out


def every_nth_float(step: int) -> NDArray[np.float32]:
    return np.arange(0, 1 << 32, step, dtype=np.uint32).view(np.float32)


@pytest.mark.parametrize("level", LEVELS)
def test_exp_is_within_an_ulp(level: str) -> None:
    x = np.random.default_rng(7).uniform(-104, 88.72, 200_000).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.maximum(np.spacing(exact.astype(np.float32)).astype(np.float64), 2.0**-149)
    assert np.max(np.abs(exp(x, level) - exact) / ulp) < 1.0


@pytest.mark.parametrize("level", LEVELS)
def test_exp_at_the_edges(level: str) -> None:
    x = np.array([-np.inf, -1e30, -104, -87.5, -0.0, 0, 88.8, 1e30, np.inf, np.nan], np.float32)
    y = exp(x, level)
    assert list(y[[0, 1, 2, 4, 5]]) == [0, 0, 0, 1, 1]
    assert 0 < y[3] < np.finfo(np.float32).tiny  # a subnormal, not flushed
    assert np.all(np.isposinf(y[6:9])) and np.isnan(y[9])


def test_exp_has_the_same_bits_at_every_level() -> None:
    x = every_nth_float(9_973)
    with np.errstate(invalid="ignore"):
        bits = {level: np.nan_to_num(exp(x, level), nan=-1).tobytes() for level in LEVELS}
    assert len(set(bits.values())) == 1


def test_exp_still_has_the_bits_that_answers_were_given_with() -> None:
    """A change of these bits changes tokens and requires a new NUMERICS_VERSION."""
    x = every_nth_float(9_973)
    finite = np.nan_to_num(exp(x[~np.isnan(x)], LEVELS[0]))
    assert hashlib.sha256(finite.tobytes()).hexdigest()[:16] == "936f275735dd57e2"


def test_exp_of_any_length_reads_and_writes_no_further() -> None:
    x = np.linspace(-3, 3, 100, dtype=np.float32)
    for length in range(1, 40):
        out = np.full(100, -5, np.float32)
        _native.exp(x[:length], out[:length], LEVELS[-1])
        assert np.array_equal(out[:length], exp(x, LEVELS[0])[:length]) and np.all(out[length:] == -5)


def test_log_is_within_1e_15() -> None:
    rng = np.random.default_rng(11)
    values = np.concatenate([np.exp(rng.uniform(-700, 700, 5_000)), rng.uniform(0.5, 2, 5_000), [5e-324, 1e-310]])
    for x in values:
        assert math.isclose(_native.log(float(x)), math.log(x), rel_tol=1e-15, abs_tol=1e-15)
    assert _native.log(1.0) == 0 and _native.log(0.0) == -math.inf and _native.log(math.inf) == math.inf
    assert math.isnan(_native.log(-1.0)) and math.isnan(_native.log(math.nan))


def test_sine_and_cosine_are_within_1e_12_up_to_a_million() -> None:
    rng = np.random.default_rng(13)
    angles = np.concatenate([rng.uniform(-1.1e6, 1.1e6, 10_000), np.arange(1_000) * (math.pi / 4), [1048575.0, 0.0]])
    for angle in angles:
        sine, cosine = _native.sincos(float(angle))
        assert abs(sine - math.sin(angle)) < 1e-12 and abs(cosine - math.cos(angle)) < 1e-12


def test_sine_and_cosine_of_what_is_out_of_reach_are_no_numbers() -> None:
    assert all(math.isnan(v) for angle in (1e7, -1e7, math.inf, math.nan) for v in _native.sincos(angle))


def test_sine_of_a_multiple_of_pi_keeps_its_digits() -> None:
    getcontext().prec = 60
    pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
    for multiple in (1, 1_000, 300_000):
        angle = float(pi * multiple)
        assert math.isclose(abs(_native.sincos(angle)[0]), float(abs(pi * multiple - Decimal(angle))), rel_tol=1e-3)
