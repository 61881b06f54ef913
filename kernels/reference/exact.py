"""The exp and log of the kernels, operation by operation, so that the reference gives the same bits."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.backend import Float32

Float64 = NDArray[np.float64]

_SHIFT32 = float.fromhex("0x1.8p23")
_SHIFT64 = float.fromhex("0x1.8p52")
_EXP32_HEX = "0x1.6a4d5ap-10 0x1.12398ep-7 0x1.5558bp-5 0x1.555492p-3 0x1.fffffcp-2 0x1p0 0x1p0"
_EXP32 = [float.fromhex(text) for text in _EXP32_HEX.split()]
_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e42fefa38p-1"), float.fromhex("0x1.ef35793c7673p-45")
LN2 = float.fromhex("0x1.62e42fefa39efp-1")
_ARTANH = [1 / n for n in range(3, 22, 2)]
_EXP64 = [1 / math.factorial(n) for n in range(14)]


def fma32(a: Float32 | float, b: Float32 | float, c: Float32 | float) -> Float32:
    """Returns a * b + c, rounded once."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.broadcast_to(np.asarray(c, np.float64), product.shape)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    # Rounds to odd, so that rounding to float32 is exact.
    is_even = (total.view(np.int64) & 1) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    total = np.where((error != 0) & is_even, np.nextafter(total, toward), total)
    return total.astype(np.float32)


def exp32(x: Float32) -> Float32:
    """Computes e^x for each float32, with the operations that all feature levels use."""
    x = np.maximum(np.float32(-104), np.minimum(np.float32(89), x)).astype(np.float32)
    n = fma32(x, float(np.float32(float.fromhex("0x1.715476p+0"))), _SHIFT32) - np.float32(_SHIFT32)
    r = fma32(-n, float.fromhex("-0x1.05c61p-29"), fma32(-n, float.fromhex("0x1.62e43p-1"), x))
    p = np.full_like(x, _EXP32[0])
    for coefficient in _EXP32[1:]:
        p = fma32(p, r, coefficient)
    return np.ldexp(p.astype(np.float64), n.astype(np.int64)).astype(np.float32)


def fma64(a: float, b: float, c: float) -> float:
    return float(Fraction(a) * Fraction(b) + Fraction(c))


def _polynomial(coefficients: list[float], z: float) -> float:
    total = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = fma64(total, z, coefficient)
    return total


def exp64(x: float) -> float:
    if x > 710:
        return math.inf
    if x < -746:
        return 0.0
    n = (x * float.fromhex("0x1.71547652b82fep+0") + _SHIFT64) - _SHIFT64
    r = fma64(-n, _LN2_LOW, fma64(-n, _LN2_HIGH, x))
    try:
        return math.ldexp(_polynomial(_EXP64, r), int(n))
    except OverflowError:
        return math.inf


def log64(x: float) -> float:
    """Returns the natural logarithm of a positive normal float64, or of 0."""
    if x == 0:
        return -math.inf
    bits, root_half = int(np.float64(x).view(np.int64)), 0x3FE6A09E667F3BCD
    exponent = (bits - root_half) >> 52
    m = float(np.int64(bits - (exponent << 52)).view(np.float64))
    s = (m - 1) / (m + 1)
    z = s * s
    tail = fma64(s * z, 2 * _polynomial(_ARTANH, z), exponent * _LN2_LOW)
    return fma64(float(exponent), _LN2_HIGH, 2 * s + tail)
