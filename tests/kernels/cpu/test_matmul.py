"""Tests of matrix products of every quant type at every feature level: correct and equal bits."""

from __future__ import annotations

import zlib
from itertools import product

import numpy as np
import pytest

from llamaclust.kernels import _native
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.quant_types import WIDER_TILES, QuantType
from support.arithmetic.matmul_cases import (
    FLOAT_TYPES,
    SCALE_PLACES,
    TYPES,
    check_equal_bits,
    packed,
    random_activations,
    random_weights,
)
from support.arithmetic.ordered_products import DECODERS, activations_of, ordered_products, segments_of
from support.arithmetic.quant_blocks import set_scales

GRID_TYPES = [kind for kind in DECODERS if kind.name.startswith(("IQ1", "IQ2", "IQ3"))]
LEVELS = _native.available_levels()
ROWS = [1, 15, 16, 17, 48, 320]
COLS = [32, 96, 256, 288, 576, 1536]
TOKENS = [1, 2, 3, 5, 8, 17, 64]
FEW_TOKENS = [1, 2, 5]  # computed by ones, twos and fours; the first two have two ways to prefetch
PANEL_TYPES = [QuantType.F16, QuantType.Q4_0, QuantType.Q8_0, QuantType.Q2_K, QuantType.Q4_K, QuantType.Q6_K]
MANY = 131  # more than any level computes without panels


def generator_of(*what: object) -> np.random.Generator:
    seed = zlib.crc32(repr(what).encode())
    print("seed", seed)
    return np.random.default_rng(seed)


def shapes(quant_type: QuantType) -> list[tuple[int, int]]:
    """Returns (rows, cols) pairs that have each number of rows and of columns at least once."""
    widths = [cols for cols in COLS if cols % quant_type.info.block_size == 0]
    return [(rows, cols) for rows in ROWS for cols in widths if rows in (17, 48) or cols in (256, 1536)]


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_the_same_bits_at_every_level_for_any_number_of_tokens(quant_type: QuantType) -> None:
    for rows, cols in shapes(quant_type):
        generator = generator_of(quant_type, rows, cols)
        matrix = packed(quant_type, random_weights(generator, quant_type, rows, cols), rows, cols)
        x = random_activations(generator, MANY, cols)
        expected = _native.matmul(LEVELS[-1], matrix, x)
        assert np.unique(expected).size > expected.size // 2
        for level in LEVELS:
            check_equal_bits(_native.matmul(level, matrix, x[:64]), expected[:64], level, rows, cols)
            for tokens, near in (*product(TOKENS, (False,)), *product(FEW_TOKENS, (True,))):
                found = _native.matmul(level, matrix, x[:tokens], near=near)
                check_equal_bits(found, expected[:tokens], level, tokens, near, rows, cols)


@pytest.mark.parametrize("quant_type", WIDER_TILES, ids=lambda kind: kind.name)
def test_wider_tiles_hold_the_same_weights(quant_type: QuantType) -> None:
    for rows, cols in shapes(quant_type):
        generator = generator_of("wider", quant_type, rows, cols)
        data = random_weights(generator, quant_type, rows, cols)
        own = packed(quant_type, data, rows, cols)
        wide = packed(quant_type, data, rows, cols, WIDER_TILES[quant_type])
        assert wide.bytes > own.bytes
        x = random_activations(generator, MANY, cols)
        expected = _native.matmul(LEVELS[-1], own, x)
        for level in LEVELS:
            for tokens in (1, 3, MANY):
                found = _native.matmul(level, wide, x[:tokens])
                check_equal_bits(found, expected[:tokens], level, tokens, rows, cols)
            check_equal_bits(_native.dequantize(level, wide), _native.dequantize(level, own), level, rows, cols)


def test_only_types_with_the_same_weights_are_packed_into_tiles_of_another() -> None:
    for quant_type in TYPES:
        matrix = _native.PackedMatrix(quant_type, 16, 256)
        for other in TYPES:
            if other is not quant_type and WIDER_TILES.get(other) is not quant_type:
                with pytest.raises(ValueError, match=f"quant type {other:d} is not packed into"):
                    matrix.pack_rows(0, bytes(16 * other.info.row_bytes(256)), other)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quant_type", PANEL_TYPES, ids=lambda kind: kind.name)
def test_the_same_bits_with_more_tokens_and_columns_than_a_panel_has(quant_type: QuantType, level: str) -> None:
    rows, cols, tokens = 70, 5632, 1030
    generator = generator_of(quant_type)
    matrix = packed(quant_type, random_weights(generator, quant_type, rows, cols), rows, cols)
    x = random_activations(generator, tokens, cols)
    together = _native.matmul(level, matrix, x)
    for token in (0, tokens - 1, *generator.integers(0, tokens, 40)):
        check_equal_bits(_native.matmul(level, matrix, x[token : token + 1]), together[token : token + 1], token)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_the_same_bits_for_any_split_of_the_rows(quant_type: QuantType, level: str) -> None:
    generator = generator_of(quant_type)
    matrix = packed(quant_type, random_weights(generator, quant_type, 150, 256), 150, 256)
    x, bias = random_activations(generator, MANY, 256), random_activations(generator, 1, 150)[0]
    plain = _native.matmul(LEVELS[-1], matrix, x)
    for threads in (2, 3, 7, 12):
        check_equal_bits(_native.matmul(level, matrix, x, threads), plain, threads)
        check_equal_bits(_native.matmul(level, matrix, x[:2], threads), plain[:2], threads)
    check_equal_bits(_native.matmul(level, matrix, x, 2, bias), plain + bias, "bias")


@pytest.mark.parametrize("quant_type", list(DECODERS), ids=lambda kind: kind.name)
def test_the_order_of_operations_is_the_documented_one(quant_type: QuantType) -> None:
    for segments in (1, 3, 6, 9):
        cols = segments * quant_type.info.block_size
        generator = generator_of(quant_type, cols)
        data = random_weights(generator, quant_type, 33, cols)
        x = random_activations(generator, 19, cols)
        expected = ordered_products(segments_of(quant_type, data, 33), activations_of(x, quant_type.info.block_size))
        check_equal_bits(_native.matmul(LEVELS[-1], packed(quant_type, data, 33, cols), x), expected, cols)


@pytest.mark.parametrize("quant_type", list(DECODERS), ids=lambda kind: kind.name)
def test_the_greatest_sums_are_exact(quant_type: QuantType) -> None:
    """Rows with equal bits in every quant, sub-block scale and min meet activations that are all 127 or all -127."""
    cols, fills = 2 * quant_type.info.block_size, [0x00, 0xFF, 0x7F, 0x80, 0x55, 0xAA]
    bytes_ = np.repeat(np.array(fills, np.uint8), 2 * quant_type.info.block_bytes)
    blocks = bytes_.reshape(-1, quant_type.info.block_bytes)
    set_scales(quant_type, blocks, SCALE_PLACES.get(quant_type, (0,)), 0.75)
    x = np.repeat(np.array([[2.0], [-2.0]], np.float32), cols, axis=1)
    weights = segments_of(quant_type, blocks.tobytes(), len(fills))
    expected = ordered_products(weights, activations_of(x, quant_type.info.block_size))
    for level in LEVELS:
        matrix = packed(quant_type, blocks.tobytes(), len(fills), cols)
        check_equal_bits(_native.matmul(level, matrix, x), expected, level)
        check_equal_bits(_native.matmul(level, matrix, np.tile(x, (70, 1))), np.tile(expected, (70, 1)), level)


@pytest.mark.parametrize("quant_type", FLOAT_TYPES, ids=lambda kind: kind.name)
def test_float_weights_are_multiplied_in_order(quant_type: QuantType) -> None:
    generator = generator_of(quant_type)
    data, x = random_weights(generator, quant_type, 33, 250), random_activations(generator, 7, 250)
    weights = dequantize(quant_type, data, 33 * 250).reshape(33, 250)
    total = np.zeros((7, 33), np.longdouble)
    for k in range(250):
        total = (x[:, None, k].astype(np.longdouble) * weights[None, :, k] + total).astype(np.float32)
    check_equal_bits(_native.matmul(LEVELS[-1], packed(quant_type, data, 33, 250), x), total.astype(np.float32))


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_products_are_near_those_of_real_numbers(quant_type: QuantType) -> None:
    """Compares with float64 on dequantized weights and unrounded activations; eight bits cost up to 1e-4 of the
    square."""
    bound = 1e-11 if quant_type in FLOAT_TYPES else 1e-4
    for cols in (256, 1536):
        generator = generator_of(quant_type, cols)
        data, x = random_weights(generator, quant_type, 80, cols), random_activations(generator, 17, cols)
        expected = x.astype(np.float64) @ dequantize(quant_type, data, 80 * cols).reshape(80, cols).T.astype(np.float64)
        actual = _native.matmul(LEVELS[0], packed(quant_type, data, 80, cols), x)
        assert ((actual - expected) ** 2).sum() <= bound * (expected**2).sum()


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_tiles_hold_the_weights(quant_type: QuantType) -> None:
    for rows, cols in shapes(quant_type):
        data = random_weights(generator_of(quant_type, rows, cols), quant_type, rows, cols)
        matrix = packed(quant_type, data, rows, cols)
        tiles, file_bytes = -(-rows // 16), -(-rows // 16) * 16 * quant_type.info.row_bytes(cols)
        most = 1.25 if file_bytes * 8 < tiles * 16 * cols * 4 else 1.1
        assert file_bytes <= matrix.bytes < most * file_bytes + 64 * tiles
        expected = dequantize(quant_type, data, rows * cols).reshape(rows, cols)
        for level in LEVELS:
            check_equal_bits(_native.dequantize(level, matrix) + 0.0, expected + 0.0, level, rows, cols)


@pytest.mark.parametrize("level", LEVELS)
def test_every_exponent_of_mxfp4(level: str) -> None:
    blocks = generator_of("exponents").integers(0, 256, (256, 17), dtype=np.uint8)
    blocks[:, 0] = range(256)
    with np.errstate(over="ignore"):
        expected = dequantize(QuantType.MXFP4, blocks.tobytes(), 256 * 32).reshape(256, 32)
    assert np.isinf(expected[255]).any() and 0 < np.abs(expected[0][expected[0] != 0]).min() == 2.0**-128
    actual = _native.dequantize(level, packed(QuantType.MXFP4, blocks.tobytes(), 256, 32))
    check_equal_bits(actual + 0.0, expected + 0.0)


@pytest.mark.parametrize("quant_type", GRID_TYPES, ids=lambda kind: kind.name)
def test_every_point_of_a_grid(quant_type: QuantType) -> None:
    """The native tables duplicate the reference's. Each of up to 2048 points occurs at least 64 times."""
    data = random_weights(generator_of(quant_type), quant_type, 512, 2048)
    matrix, weights = packed(quant_type, data, 512, 2048), dequantize(quant_type, data, 512 * 2048).reshape(512, 2048)
    for level in LEVELS:
        check_equal_bits(_native.dequantize(level, matrix) + 0.0, weights + 0.0, level)


@pytest.mark.parametrize("width", [32, 256])
@pytest.mark.parametrize("level", LEVELS)
def test_activations_in_eight_bits(level: str, width: int) -> None:
    generator = generator_of(width)
    x = random_activations(generator, 40, 768)
    x[0] = 0
    x[1] = 2.0**-119
    x[2] = np.float32(2.0**-118) * (1 + generator.random(768))
    x[3] *= np.float32(1e37) / np.abs(x[3]).max()
    x[4] = generator.integers(-127, 128, 768) + np.float32(0.5)
    x[4, ::width] = 127
    layout = [("q", np.int8, width), ("scale", np.float32), ("scaled_sum", np.float32), ("sum", np.int32)]
    if width == 256:
        layout = [("q", np.int8, width), ("sums", np.int32, 16), ("high", np.int8, 8), ("low", np.int8, 8)]
        layout += [("high_16", np.int8, 16), ("low_16", np.int8, 16), ("scale", np.float32), ("padding", np.int32, 3)]
    kind = np.dtype(layout)
    rows = _native.quantize(level, f"Q8_{width}", x)
    actual = np.ascontiguousarray(rows[:, : 768 // width * kind.itemsize]).view(kind)
    expected = activations_of(x, width)
    np.testing.assert_array_equal(actual["q"], expected.quants)
    np.testing.assert_array_equal(actual["scale"], expected.scales)
    if width == 32:
        np.testing.assert_array_equal(actual["sum"], expected.quants.sum(-1))
        np.testing.assert_array_equal(
            actual["scaled_sum"], expected.scales * expected.quants.sum(-1).astype(np.float32)
        )
    else:
        sums = expected.quants.reshape(40, 3, 16, 16).sum(-1)
        np.testing.assert_array_equal(actual["sums"], sums)
        of_32 = actual["high"].astype(np.int32) * 128 + actual["low"]
        np.testing.assert_array_equal(of_32, sums[..., ::2] + sums[..., 1::2])
        np.testing.assert_array_equal(actual["high_16"].astype(np.int32) * 128 + actual["low_16"], sums)


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_numbers_that_are_none(quant_type: QuantType) -> None:
    """Infinities, NaNs and overflow in activations and weights give equal bits at all levels and affect only their
    rows."""
    generator = generator_of(quant_type)
    data = bytearray(random_weights(generator, quant_type, 32, 512))
    x = random_activations(generator, 9, 512)
    sane = _native.matmul(LEVELS[-1], packed(quant_type, bytes(data), 32, 512), x)
    x[1, 3], x[2, 300], x[3, 7], x[4], x[5, 500] = np.inf, np.nan, -np.inf, np.float32(3e38), np.float32(-1e-40)
    width = quant_type.info.row_bytes(512)
    data[2 * width : 3 * width] = bytes([255]) * width
    data[5 * width : 6 * width] = generator.integers(0, 256, width, dtype=np.uint8).tobytes()
    matrix = packed(quant_type, bytes(data), 32, 512)
    expected = _native.matmul(LEVELS[-1], matrix, x)
    assert np.isnan(expected[1:4]).all() or quant_type in FLOAT_TYPES
    assert np.isnan(expected[:, 2]).all() or quant_type is QuantType.MXFP4  # a type without NaN
    assert set(expected[np.isnan(expected)].view(np.uint32)) == {0x7FC00000}
    others = [row for row in range(32) if row not in (2, 5)]
    check_equal_bits(expected[6:, others], sane[6:, others])
    for level in LEVELS:
        check_equal_bits(_native.matmul(level, matrix, x), expected, level)
        check_equal_bits(_native.matmul(level, matrix, x[2:3]), expected[2:3], level)


def test_what_cannot_be_multiplied_is_refused() -> None:
    with pytest.raises(ValueError, match="quant type 24"):
        _native.PackedMatrix(24, 16, 32)
    with pytest.raises(ValueError, match="multiple of 256"):
        _native.PackedMatrix(QuantType.Q4_K, 16, 288)
    matrix = _native.PackedMatrix(QuantType.Q8_0, 16, 64)
    with pytest.raises(ValueError, match="another width"):
        _native.matmul(LEVELS[0], matrix, np.zeros((1, 32), np.float32))
    with pytest.raises(ValueError, match="bias"):
        _native.matmul(LEVELS[0], matrix, np.zeros((1, 64), np.float32), 1, np.zeros(15, np.float32))
    with pytest.raises(ValueError, match="available: generic"):
        _native.matmul("avx9", matrix, np.zeros((1, 64), np.float32))
