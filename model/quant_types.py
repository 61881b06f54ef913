"""ggml's weight types, one row each: weights in a block, bytes of a block, and the activations it is multiplied by."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import prod


class QuantType(IntEnum):
    """ggml's own numbers, as they stand in GGUF files. Which of them can be computed with is for a backend to say."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41

    @property
    def info(self) -> TypeInfo:
        return TYPE_INFO[self]

    def tensor_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of a row-major shape, slowest first."""
        return prod(shape[:-1]) * self.info.row_bytes(shape[-1])


class ActivationFormat(IntEnum):
    """How activations are stored for a dot product with a weight type: float32, or int8 with one scale a segment."""

    F32 = 1
    Q8_32 = 32
    Q8_256 = 256


TILE_ROWS = 16
_CACHE_LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """One row of the table; `activation` is None where no dot product is defined (integers, ggml's internal types).

    `tile_extra_bytes`: what a block takes in memory beyond its bytes in a file, where quick decoding is worth that.
    """

    block_size: int
    block_bytes: int
    activation: ActivationFormat | None
    tile_extra_bytes: int = 0

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights, a multiple of the block size."""
        assert width % self.block_size == 0
        return width // self.block_size * self.block_bytes

    def tile_bytes(self, width: int) -> int:
        """Bytes of sixteen such rows as they lie in memory to be computed with: whole cache lines."""
        assert width % self.block_size == 0
        blocks = TILE_ROWS * (width // self.block_size)
        return -(-blocks * (self.block_bytes + self.tile_extra_bytes) // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES


_F32, _Q8_32, _Q8_256 = ActivationFormat.F32, ActivationFormat.Q8_32, ActivationFormat.Q8_256

TYPE_INFO: dict[QuantType, TypeInfo] = {
    QuantType.F32: TypeInfo(1, 4, _F32),
    QuantType.F16: TypeInfo(1, 2, _F32),
    QuantType.BF16: TypeInfo(1, 2, _F32),
    QuantType.F64: TypeInfo(1, 8, None),
    QuantType.I8: TypeInfo(1, 1, None),
    QuantType.I16: TypeInfo(1, 2, None),
    QuantType.I32: TypeInfo(1, 4, None),
    QuantType.I64: TypeInfo(1, 8, None),
    QuantType.Q4_0: TypeInfo(32, 18, _Q8_32),
    QuantType.Q4_1: TypeInfo(32, 20, _Q8_32),
    QuantType.Q5_0: TypeInfo(32, 22, _Q8_32),
    QuantType.Q5_1: TypeInfo(32, 24, _Q8_32),
    QuantType.Q8_0: TypeInfo(32, 34, _Q8_32),
    QuantType.Q8_1: TypeInfo(32, 36, None),
    QuantType.IQ4_NL: TypeInfo(32, 18, _Q8_32),
    QuantType.MXFP4: TypeInfo(32, 17, _Q8_32),
    QuantType.NVFP4: TypeInfo(64, 36, _Q8_32),
    QuantType.Q1_0: TypeInfo(128, 18, _Q8_32),
    QuantType.Q2_K: TypeInfo(256, 84, _Q8_256),
    QuantType.Q3_K: TypeInfo(256, 110, _Q8_256),
    QuantType.Q4_K: TypeInfo(256, 144, _Q8_256),
    QuantType.Q5_K: TypeInfo(256, 176, _Q8_256),
    QuantType.Q6_K: TypeInfo(256, 210, _Q8_256),
    QuantType.Q8_K: TypeInfo(256, 292, None),
    QuantType.IQ1_S: TypeInfo(256, 50, _Q8_256, 12),
    QuantType.IQ1_M: TypeInfo(256, 56, _Q8_256, 12),
    QuantType.IQ2_XXS: TypeInfo(256, 66, _Q8_256, 4),
    QuantType.IQ2_XS: TypeInfo(256, 74, _Q8_256, 4),
    QuantType.IQ2_S: TypeInfo(256, 82, _Q8_256, 16),
    QuantType.IQ3_XXS: TypeInfo(256, 98, _Q8_256, 4),
    QuantType.IQ3_S: TypeInfo(256, 110, _Q8_256, 24),
    QuantType.IQ4_XS: TypeInfo(256, 136, _Q8_256, 2),
    QuantType.TQ1_0: TypeInfo(256, 54, _Q8_256, 12),
    QuantType.TQ2_0: TypeInfo(256, 66, _Q8_256),
}
