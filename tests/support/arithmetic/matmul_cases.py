"""Random weights and activations of matrix products, and a bit-exact comparison."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels import _native
from llamaclust.model.quant_types import QuantType
from support.arithmetic.ordered_products import DECODERS
from support.arithmetic.quant_blocks import set_scales

Float32 = NDArray[np.float32]


FLOAT_TYPES = [QuantType.F32, QuantType.F16, QuantType.BF16]


TYPES = [*FLOAT_TYPES, *DECODERS]


SCALE_PLACES = {
    QuantType.Q4_1: (0, 2),
    QuantType.Q5_1: (0, 2),
    QuantType.Q2_K: (80, 82),
    QuantType.Q3_K: (108,),
    QuantType.Q4_K: (0, 2),
    QuantType.Q5_K: (0, 2),
    QuantType.Q6_K: (208,),
    QuantType.MXFP4: (),
    QuantType.TQ2_0: (64,),
    QuantType.TQ1_0: (52,),
}


def random_weights(generator: np.random.Generator, quant_type: QuantType, rows: int, cols: int) -> bytes:
    """Returns rows in the file's layout with random bit patterns, and scales of both signs and many sizes."""
    if quant_type in FLOAT_TYPES:
        values = generator.standard_normal((rows, cols)).astype(np.float32)
        if quant_type is QuantType.BF16:
            return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return values.astype(np.float16 if quant_type is QuantType.F16 else np.float32).tobytes()
    info = quant_type.info
    count = rows * cols // info.block_size
    blocks = generator.integers(0, 256, (count, info.block_bytes), dtype=np.uint8)
    for place in SCALE_PLACES.get(quant_type, (0,)):
        scales = np.exp2(generator.uniform(-9, -3, count)) * generator.choice([-1, 1], count)
        set_scales(quant_type, blocks, (place,), scales)
    if quant_type is QuantType.MXFP4:
        blocks[:, 0] = generator.integers(118, 126, count)  # 2^-10 to 2^-3
    return blocks.tobytes()


def random_activations(generator: np.random.Generator, tokens: int, cols: int) -> Float32:
    x = (generator.standard_normal((tokens, cols)) * np.exp2(generator.uniform(-4, 4, (tokens, 1)))).astype(np.float32)
    assert x.size == 1 or np.unique(x).size > x.size // 2
    return x


def packed(
    quant_type: QuantType, data: bytes, rows: int, cols: int, tile_type: QuantType | None = None
) -> _native.PackedMatrix:
    """Packs rows in tiles of `tile_type`, by default the weights' own type."""
    matrix = _native.PackedMatrix(tile_type or quant_type, rows, cols)
    row_bytes = quant_type.info.row_bytes(cols)
    for first in range(0, rows, 32):
        matrix.pack_rows(first, data[first * row_bytes : (first + 32) * row_bytes], quant_type)
    return matrix


def check_equal_bits(actual: Float32, expected: Float32, *where: object) -> None:
    """Raises AssertionError with `where`, the shape, and the first index whose bits differ, with both values."""
    assert actual.shape == expected.shape, (*where, actual.shape, expected.shape)
    differ = np.argwhere(actual.view(np.uint32) != expected.view(np.uint32))
    if len(differ):
        first = tuple(map(int, differ[0]))
        found, wanted = (f"{x[first]!r} ({x[first].view(np.uint32):#010x})" for x in (actual, expected))
        what = f"{len(differ)} of {actual.size} values of {actual.shape} differ"
        raise AssertionError(f"{[*where] or 'bits'}: {what}, first {first}: {found} instead of {wanted}")
