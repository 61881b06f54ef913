"""Types of KV memory, and how wide keys and values lie in it."""

from __future__ import annotations

from enum import StrEnum

KV_BLOCK_TOKENS = 16
"""Positions in one KV block: the unit that the coordinator hands out and that block tables name."""

KV_GROUP_CHANNELS = 32
"""Channels of a key or value that share a scale where the KV type has scales."""

KV_VALUE_CHANNELS = 16
"""A stored value takes a multiple of these channels: the lanes that sum it."""


class KvType(StrEnum):
    """How keys and values are rounded before any use: float16, or int8 with a float16 scale for 32 channels. With INT8,
    queries and weights of positions are rounded to 8 bits as well, and attention is computed in integers."""

    F16 = "f16"
    Q8_0 = "q8_0"
    INT8 = "int8"

    def key_bytes(self, channels: int) -> int:
        """KV memory of one head's key at one position, padding and scales among it."""
        if self is KvType.F16:
            return 2 * channels
        together = 4 if self is KvType.INT8 else 2  # channels of a position that lie side by side
        return -(-channels // together) * together + 2 * -(-channels // KV_GROUP_CHANNELS)

    def pair_bytes(self, channels: int) -> int:
        """The same of key and value."""
        value = -(-channels // KV_VALUE_CHANNELS) * KV_VALUE_CHANNELS
        if self is KvType.F16:
            return self.key_bytes(channels) + 2 * value
        return self.key_bytes(channels) + value + 2 * -(-channels // KV_GROUP_CHANNELS)
