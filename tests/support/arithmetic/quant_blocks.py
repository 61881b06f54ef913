"""Blocks of every quant type, filled with fixed bytes that decode to finite numbers."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.quant_types import QuantType

_HIGH_FLOAT_BYTES: dict[QuantType, tuple[int, ...]] = {
    QuantType.F32: (3,),
    QuantType.Q4_1: (1, 3),
    QuantType.Q5_1: (1, 3),
    QuantType.Q2_K: (81, 83),
    QuantType.Q3_K: (109,),
    QuantType.Q4_K: (1, 3),
    QuantType.Q5_K: (1, 3),
    QuantType.Q6_K: (209,),
    QuantType.IQ1_M: (55,),
    QuantType.TQ1_0: (53,),
    QuantType.TQ2_0: (65,),
    QuantType.MXFP4: (0,),
}
"""The bytes with the sign and upper exponent bits of a block's floats; all other types have them in byte 1."""


def set_scales(quant_type: QuantType, blocks: NDArray[np.uint8], places: tuple[int, ...], scales: Any) -> None:
    """Writes float16 scales [blocks] to `blocks` [blocks, block_bytes] at each of `places`; IQ1_M stores four bits in
    each of four places."""
    halves = np.ascontiguousarray(np.broadcast_to(np.asarray(scales, np.float16), len(blocks)))
    if quant_type is QuantType.IQ1_M:
        quarters = halves.view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16)
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | (quarters & 15).astype(np.uint8) << 4
        return
    for place in places:
        blocks[:, place : place + 2] = halves[:, None].view(np.uint8)


def stream_blocks(quant_type: QuantType, count: int) -> NDArray[np.uint8]:
    """Builds blocks [count, block_bytes] from a hash of the type's name; the top exponent bit of floats is cleared."""
    width = quant_type.info.block_bytes
    data = hashlib.shake_128(quant_type.name.encode()).digest(count * width)
    return finite_blocks(quant_type, np.frombuffer(data, np.uint8).reshape(count, width))


def finite_blocks(quant_type: QuantType, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns a copy of arbitrary `blocks` [count, block_bytes] with the top exponent bit of floats cleared."""
    finite = blocks.copy()
    for place in _HIGH_FLOAT_BYTES.get(quant_type, (1,)):
        finite[:, place] &= 0xBF
    return finite
