"""Tests that native decoders at every level and the reference dequantize every type to gguf-py's bits."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize as dequantize_by_gguf_py
from numpy.typing import NDArray

from llamaclust.kernels import _native
from llamaclust.kernels.packed.weights import SUPPORTED_TYPES
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.quant_types import QuantType
from support.arithmetic.matmul_cases import TYPES, check_equal_bits, packed
from support.arithmetic.quant_blocks import finite_blocks

ROWS, COLS = 250, 1536


def random_blocks(quant_type: QuantType) -> NDArray[np.uint8]:
    """Returns random rows [ROWS, bytes] that decode to finite numbers, with scales of all sizes."""
    seed = zlib.crc32(quant_type.name.encode())
    print("seed", seed)
    info = quant_type.info
    count = ROWS * COLS // info.block_size
    blocks = np.random.default_rng(seed).integers(0, 256, (count, info.block_bytes), np.uint8)
    return finite_blocks(quant_type, blocks).reshape(ROWS, -1)


def test_all_types_are_compared() -> None:
    assert set(TYPES) == set(SUPPORTED_TYPES) and len(TYPES) == 25


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda kind: kind.name)
def test_weights_have_the_bits_of_gguf_py(quant_type: QuantType) -> None:
    """Native decoders may differ in the sign of zero, since they convert integers."""
    blocks = random_blocks(quant_type)
    expected = dequantize_by_gguf_py(blocks, GGMLQuantizationType(quant_type)).astype(np.float32).reshape(ROWS, COLS)
    assert np.isfinite(expected).all() and len(np.unique(expected)) > 100
    reference = dequantize(quant_type, blocks.tobytes(), ROWS * COLS).reshape(ROWS, COLS)
    check_equal_bits(reference, expected, "reference")
    matrix = packed(quant_type, blocks.tobytes(), ROWS, COLS)
    for level in _native.available_levels():
        check_equal_bits(_native.dequantize(level, matrix) + 0.0, expected + 0.0, level)
