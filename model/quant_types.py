"""The table of ggml's weight types: block sizes, and the format of activations in products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from typing import Any, Final, Self


class ActivationFormat(IntEnum):
    """The format of activations in products: float32, or int8 with a scale for each 32 or 256 channels."""

    F32 = 1
    Q8_32 = 32
    Q8_256 = 256


TILE_ROWS = 16
_CACHE_LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """The properties of a quant type. `activation` is None for types without a dot product, which are integers and
    ggml's internal types. In packed weights, a block has `tile_extra_bytes` more bytes, which make decoding faster."""

    block_size: int
    block_bytes: int
    activation: ActivationFormat | None
    tile_extra_bytes: int = 0

    def row_bytes(self, width: int) -> int:
        assert width % self.block_size == 0
        return width // self.block_size * self.block_bytes

    def tile_bytes(self, width: int) -> int:
        """Returns the size of a tile in bytes. A tile is 16 rows of packed weights, padded to whole cache lines."""
        assert width % self.block_size == 0
        blocks = TILE_ROWS * (width // self.block_size)
        return -(-blocks * (self.block_bytes + self.tile_extra_bytes) // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES


_F32, _Q8_32, _Q8_256 = ActivationFormat


class QuantType(IntEnum):
    """ggml's types. A member's value is its number in GGUF files. `info` has its properties. Backends may support only
    some types."""

    info: TypeInfo

    def __new__(cls, number: int, *info: Any) -> Self:
        member = int.__new__(cls, number)
        member._value_, member.info = number, TypeInfo(*info)
        return member

    F32 = 0, 1, 4, _F32
    F16 = 1, 1, 2, _F32
    Q4_0 = 2, 32, 18, _Q8_32
    Q4_1 = 3, 32, 20, _Q8_32
    Q5_0 = 6, 32, 22, _Q8_32
    Q5_1 = 7, 32, 24, _Q8_32
    Q8_0 = 8, 32, 34, _Q8_32
    Q8_1 = 9, 32, 36, None
    Q2_K = 10, 256, 84, _Q8_256
    Q3_K = 11, 256, 110, _Q8_256
    Q4_K = 12, 256, 144, _Q8_256
    Q5_K = 13, 256, 176, _Q8_256
    Q6_K = 14, 256, 210, _Q8_256
    Q8_K = 15, 256, 292, None
    IQ2_XXS = 16, 256, 66, _Q8_256, 4
    IQ2_XS = 17, 256, 74, _Q8_256, 4
    IQ3_XXS = 18, 256, 98, _Q8_256, 4
    IQ1_S = 19, 256, 50, _Q8_256, 12
    IQ4_NL = 20, 32, 18, _Q8_32
    IQ3_S = 21, 256, 110, _Q8_256, 24
    IQ2_S = 22, 256, 82, _Q8_256, 16
    IQ4_XS = 23, 256, 136, _Q8_256, 2
    I8 = 24, 1, 1, None
    I16 = 25, 1, 2, None
    I32 = 26, 1, 4, None
    I64 = 27, 1, 8, None
    F64 = 28, 1, 8, None
    IQ1_M = 29, 256, 56, _Q8_256, 12
    BF16 = 30, 1, 2, _F32
    TQ1_0 = 34, 256, 54, _Q8_256, 4
    TQ2_0 = 35, 256, 66, _Q8_256
    MXFP4 = 39, 32, 17, _Q8_32
    NVFP4 = 40, 64, 36, _Q8_32
    Q1_0 = 41, 128, 18, _Q8_32

    def tensor_bytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape[:-1]) * self.info.row_bytes(shape[-1])


WIDER_TILES: Final[Mapping[QuantType, QuantType]] = {
    QuantType.IQ2_XXS: QuantType.IQ2_S,
    QuantType.IQ2_XS: QuantType.IQ2_S,
    QuantType.TQ1_0: QuantType.TQ2_0,
}
"""Types that may be packed as tiles of another type. Results are bit-identical and faster, but need more memory."""
