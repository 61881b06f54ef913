"""Tests of quantization: every decoder reads the same weights, errors are no larger than ggml's, and bytes are equal at
every feature level."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize as dequantize_by_gguf_py
from numpy.typing import NDArray

from llamaclust.kernels import _native
from llamaclust.kernels.cpu.quantize import QUANTIZED_TYPES, as_importance, quantize, to_floats
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.quant_types import QuantType
from support.arithmetic.quantize_matrix import COLS, ROWS, SEED, TYPES, cases, matrix, relative_error
from support.paths import DATA

_THEIRS = json.loads((DATA / "quantize/errors.json").read_text())
_MOST = 1.02
_WITH_OFFSETS = [QuantType.Q4_1, QuantType.Q5_1, QuantType.Q2_K, QuantType.Q4_K, QuantType.Q5_K]


@pytest.mark.parametrize(("quant_type", "has"), cases(), ids=lambda value: getattr(value, "name", str(value)))
def test_errors_are_no_larger_than_ggmls(quant_type: QuantType, has: bool) -> None:
    x, importance = matrix()
    data = quantize(quant_type, x, importance if has else None).tobytes()
    ours = relative_error(quant_type, data, x, importance if has else None)
    theirs = _THEIRS[quant_type.name + "+" * has]
    print(f"{ours:.6f}, ggml {theirs:.6f}, ratio {ours / theirs:.4f}")
    assert 0 < ours <= _MOST * theirs


@pytest.mark.parametrize("quant_type", QUANTIZED_TYPES, ids=lambda kind: kind.name)
def test_every_decoder_reads_what_is_written(quant_type: QuantType) -> None:
    x, importance = matrix()
    blocks = quantize(quant_type, x, importance)
    read = dequantize(quant_type, blocks.tobytes(), x.size).reshape(x.shape)
    by_gguf_py = dequantize_by_gguf_py(blocks, GGMLQuantizationType(quant_type)).astype(np.float32).reshape(x.shape)
    assert (read == by_gguf_py).all()
    assert (to_floats(quant_type, bytearray(blocks.tobytes()), COLS) == read).all()
    assert np.corrcoef(read.ravel(), x.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_every_level_and_every_cut_writes_the_same_bytes(quant_type: QuantType) -> None:
    x, importance = matrix()
    x = x[:4]
    expected = quantize(quant_type, x, importance)
    for level in _native.available_levels():
        assert (quantize(quant_type, x, importance, level) == expected).all(), level
    by_rows = [quantize(quant_type, x[row : row + 1].copy(), importance) for row in range(len(x))]
    assert (np.concatenate(by_rows) == expected).all()


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_unusual_rows(quant_type: QuantType) -> None:
    """Zeros stay zeros, and no weight becomes large relative to the largest weight of its row."""
    ramp = np.linspace(-1, 1, COLS, dtype=np.float32)
    spike = np.zeros(COLS, np.float32)
    spike[77] = -3
    some_zero = np.where(np.arange(COLS) % 512 < 256, ramp, 0).astype(np.float32)
    rows = [0 * ramp, spike, ramp, -np.abs(ramp) - 1, np.ones_like(ramp), 65504 * ramp, 1e-7 * ramp, 1e-30 * ramp]
    x = np.stack([*rows, some_zero]).astype(np.float32)
    for importance in (None, as_importance(np.zeros(COLS, np.float32)), as_importance(1e6 * (ramp > 0.9) + 0 * ramp)):
        data = quantize(quant_type, x, importance).tobytes()
        read = dequantize(quant_type, data, x.size).reshape(x.shape)
        assert np.isfinite(read).all()
        assert (read[0] == 0).all()
        extent = np.abs(x).max(axis=1, keepdims=True)
        assert (np.abs(read) <= 2.2 * extent + 1e-6).all(), np.abs(read).max(axis=1) / extent[:, 0]
        assert (read[8].reshape(-1, 256)[1::2] == 0).all() or importance is not None


@pytest.mark.parametrize("quant_type", _WITH_OFFSETS, ids=lambda kind: kind.name)
def test_equal_weights_keep_their_value(quant_type: QuantType) -> None:
    """Blocks of equal or nearly equal weights, and runs of equal weights between others, keep their values."""
    x, _ = matrix()
    run = np.arange(COLS) % 256 >= 128
    near = 1 - np.float32(0.003) * np.random.default_rng(SEED).random(COLS, np.float32)
    same = np.ones_like(near)
    x = np.stack([0.5 * same, -0.5 * same, same / 3, near, -near, *(np.where(run, at, x[0]) for at in (0.06, -0.06))])
    x = x.astype(np.float32)
    blocks = quantize(quant_type, x, None)
    read = dequantize(quant_type, blocks.tobytes(), x.size).reshape(x.shape)
    error = np.sqrt(((read - x) ** 2)[:, run].sum(axis=1) / (x**2)[:, run].sum(axis=1))
    assert (error <= 0.02).all(), error
    for level in _native.available_levels():
        assert (quantize(quant_type, x, None, level) == blocks).all(), level


@pytest.mark.parametrize("quant_type", _WITH_OFFSETS, ids=lambda kind: kind.name)
def test_one_important_weight_keeps_its_value(quant_type: QuantType) -> None:
    x, _ = matrix()
    importance = as_importance((np.arange(COLS) == 77).astype(np.float32))
    blocks = quantize(quant_type, x, importance)
    assert relative_error(quant_type, blocks.tobytes(), x, importance) <= 0.01
    for level in _native.available_levels():
        assert (quantize(quant_type, x, importance, level) == blocks).all(), level


@pytest.mark.parametrize("quant_type", [QuantType.Q4_0, QuantType.Q5_0], ids=lambda kind: kind.name)
def test_largest_weights_keep_the_outermost_level(quant_type: QuantType) -> None:
    """Coarser scales have smaller errors but give models with a larger divergence; an importance matrix replaces this
    rule."""
    x, _ = matrix()
    blocks = x.reshape(-1, 32)
    largest = np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)

    def share(importance: NDArray[np.float32] | None) -> float:
        data = quantize(quant_type, x, importance).tobytes()
        read = dequantize(quant_type, data, x.size).reshape(-1, 32)
        scales = np.frombuffer(data, np.uint8).reshape(len(blocks), -1)[:, :2].copy().view("<f2").astype(np.float32)
        outermost = -(2.0 ** (4 if quant_type == QuantType.Q5_0 else 3))
        return float((read[largest] == outermost * scales[:, 0]).mean())

    assert share(None) > 0.95 > 0.9 > share(np.ones(COLS, np.float32))


def test_weights_in_a_types_own_values_come_back_as_they_were() -> None:
    """Models trained with ternary weights or fixed steps lose nothing."""
    random = np.random.default_rng(9)
    levels = {QuantType.TQ1_0: 1, QuantType.TQ2_0: 1, QuantType.Q8_0: 127}
    for quant_type, top in levels.items():
        x = random.integers(-top, top + 1, (ROWS, COLS)).astype(np.float32) * np.float32(0.5)
        x[:, ::32] = 0.5 * top
        data = quantize(quant_type, x, None).tobytes()
        assert (dequantize(quant_type, data, x.size).reshape(x.shape) == x).all(), quant_type


def test_what_does_not_fit_is_refused() -> None:
    x = np.zeros((2, 96), np.float32)
    out = np.zeros((2, 54), np.uint8)
    for kind, weights, importance, into in (
        (int(QuantType.Q4_K), x, None, out),
        (int(QuantType.Q4_0), x, None, out[:, :53].copy()),
        (int(QuantType.Q4_0), x, np.ones(95, np.float32), out),
        (int(QuantType.Q8_K), x, None, out),
    ):
        with pytest.raises(ValueError, match=r"type|blocks|shape|width"):
            _native.quantize_rows("", kind, weights, importance, into)
