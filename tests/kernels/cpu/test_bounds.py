"""Tests of products of every quant type at every level against float64: each element is within the bound that
docs/internals/numerics.md proves ("How far from exact")."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.kernels import _native
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.quant_types import QuantType
from support.arithmetic.matmul_cases import FLOAT_TYPES, TYPES, packed, random_activations, random_weights
from support.arithmetic.ordered_products import DECODERS, activations_of, segments_of

Float64 = NDArray[np.float64]

LEVELS = _native.available_levels()
TOKENS = [*range(1, 10), 17, 64, 131]
SHAPES = [(1, 1536), (7, 64), (15, 32), (15, 256), (16, 96), (17, 576), (33, 1536), (50, 512), (97, 768)]
"""(rows, cols); each type is tested with the shapes that its blocks divide."""

ROUNDING = 2.0**-24
HALF_STEP = (1 + 2.0**-14) / 254
"""The largest change of a value by rounding to eight bits, relative to its segment's largest activation."""


def gamma(roundings: int) -> float:
    """Returns the largest relative error of this number of consecutive roundings."""
    return roundings * ROUNDING / (1 - roundings * ROUNDING)


def parts_of(quant_type: QuantType, data: bytes, rows: int) -> tuple[Float64, int]:
    """Returns |scale part| + |min part| of every weight [rows, segments, width], and the additions per segment."""
    weights = segments_of(quant_type, data, rows)
    sizes = np.abs(weights.scales[..., None].astype(np.float64) * weights.quants)
    if weights.mins is None:
        return sizes, 1
    mins = np.abs(weights.mins[..., None].astype(np.float64))
    if weights.sub_mins is not None:
        mins = np.repeat(mins * weights.sub_mins, sizes.shape[-1] // weights.sub_mins.shape[-1], axis=-1)
    return sizes + mins, 2


def quantized_bounds(quant_type: QuantType, data: bytes, rows: int, x: NDArray[np.float32]) -> tuple[Float64, Float64]:
    """Returns bounds [tokens, rows] on the errors of rounding to eight bits and of float32 sums."""
    sizes, additions = parts_of(quant_type, data, rows)
    weights = np.abs(dequantize(quant_type, data, rows * x.shape[1]).astype(np.float64)).reshape(sizes.shape).sum(-1)
    greatest = np.abs(x.astype(np.float64)).reshape(len(x), sizes.shape[1], -1).max(-1)
    of_eight_bits = HALF_STEP * greatest @ weights.T
    of_sums = gamma(additions * sizes.shape[1] + 2) * (1 + 2.0**-22) * greatest @ sizes.sum(-1).T
    return of_eight_bits, of_sums


def exact(weights: NDArray[np.float32], x: Float64) -> Float64:
    return x @ weights.astype(np.float64).T


def check(quant_type: QuantType, rows: int, cols: int) -> list[float]:
    """Compares products at every level for all TOKENS, and returns the largest errors relative to their bounds."""
    seed = zlib.crc32(repr((quant_type, rows, cols)).encode())
    print("seed", seed)
    generator = np.random.default_rng(seed)
    data, x = random_weights(generator, quant_type, rows, cols), random_activations(generator, TOKENS[-1], cols)
    weights, matrix = (
        dequantize(quant_type, data, rows * cols).reshape(rows, cols),
        packed(quant_type, data, rows, cols),
    )
    targets = {}
    if quant_type in FLOAT_TYPES:
        targets["exact"] = (exact(weights, x.astype(np.float64)), gamma(cols) * exact(np.abs(weights), np.abs(x)))
    else:
        of_eight_bits, of_sums = quantized_bounds(quant_type, data, rows, x)
        rounded = activations_of(x, quant_type.info.block_size)
        seen: Float64 = np.multiply(rounded.quants, rounded.scales[..., None], dtype=np.float64).reshape(x.shape)
        targets["rounded"] = (exact(weights, seen), of_sums)
        targets["exact"] = (exact(weights, x.astype(np.float64)), of_eight_bits + of_sums)
    used = []
    for wanted, bound in targets.values():
        assert wanted.std() > 0 and (bound > 0).all()
        for level in LEVELS:
            for tokens in TOKENS:
                found = _native.matmul(level, matrix, x[:tokens])
                share = np.abs(found - wanted[:tokens]) / bound[:tokens]
                assert share.max() <= 1, (level, tokens, np.argwhere(share > 1)[:3])
                used.append(float(share.max()))
    return used


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_products_are_within_the_proven_bound(quant_type: QuantType) -> None:
    shapes = [(rows, cols) for rows, cols in SHAPES if cols % quant_type.info.block_size == 0]
    assert len(shapes) >= 5
    used = [share for rows, cols in shapes for share in check(quant_type, rows, cols)]
    assert max(used) > 1e-3, "a bound that nothing comes near holds nothing"


@pytest.mark.parametrize("quant_type", list(DECODERS), ids=lambda kind: kind.name)
def test_the_bound_on_sums_notices_a_wrong_weight(quant_type: QuantType) -> None:
    """One quant of 16 x 512 that is off by one step is far outside the bound on sums of rounded activations."""
    generator = np.random.default_rng(5)
    data, x = bytearray(random_weights(generator, quant_type, 16, 512)), random_activations(generator, 3, 512)
    _, of_sums = quantized_bounds(quant_type, bytes(data), 16, x)
    right = _native.matmul(LEVELS[-1], packed(quant_type, bytes(data), 16, 512), x)
    data[quant_type.info.block_bytes // 2] ^= 1
    wrong = _native.matmul(LEVELS[-1], packed(quant_type, bytes(data), 16, 512), x)
    assert (np.abs(wrong - right) > 2 * of_sums).any()
