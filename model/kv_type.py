"""Types of KV memory, and the sizes of keys and values in it."""

from __future__ import annotations

from enum import StrEnum

KV_BLOCK_TOKENS = 16
"""The number of positions in a KV block. The coordinator allocates KV blocks, and block tables list them."""

KV_GROUP_CHANNELS = 32
"""The number of channels of a key or value that share one scale. Only KV types with scales use this number."""

KV_VALUE_CHANNELS = 16
"""The number of channels that kernels sum at a time. Stored values are padded to a multiple of this number."""


class KvType(StrEnum):
    """The type to which keys and values are rounded before use. F16 is float16. Q8_0 and INT8 are int8 with a float16
    scale for each 32 channels. With INT8, queries and attention weights have 8 bits too, and attention is computed in
    integers."""

    F16 = "f16"
    Q8_0 = "q8_0"
    INT8 = "int8"

    def key_bytes(self, channels: int) -> int:
        if self is KvType.F16:
            return 2 * channels
        together = 4 if self is KvType.INT8 else 2  # Number of channels of a position that are adjacent in memory.
        return -(-channels // together) * together + 2 * -(-channels // KV_GROUP_CHANNELS)

    def pair_bytes(self, channels: int) -> int:
        value = -(-channels // KV_VALUE_CHANNELS) * KV_VALUE_CHANNELS
        if self is KvType.F16:
            return self.key_bytes(channels) + 2 * value
        return self.key_bytes(channels) + value + 2 * -(-channels // KV_GROUP_CHANNELS)
