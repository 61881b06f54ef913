"""Values that options of steps have: types of KV memory, rotations, activations, gatings."""

from __future__ import annotations

from enum import StrEnum

KV_GROUP_CHANNELS = 32
"""Channels of a key or value that share a scale where the KV type has scales."""

KV_VALUE_CHANNELS = 16
"""A stored value takes a multiple of these channels: the lanes that sum it."""


class KvType(StrEnum):
    """How keys and values are rounded before any use: float16, or int8 with a float16 scale for 32 channels."""

    F16 = "f16"
    Q8_0 = "q8_0"

    def pair_bytes(self, channels: int) -> int:
        """KV memory of one head's key and value at one position, padding and scales among it."""
        value = -(-channels // KV_VALUE_CHANNELS) * KV_VALUE_CHANNELS
        if self is KvType.F16:
            return 2 * (channels + value)
        key, groups = channels + channels % 2, -(-channels // KV_GROUP_CHANNELS)  # int8 keys lie in pairs of channels
        return key + value + 2 * 2 * groups


class RopeStyle(StrEnum):
    """Which pairs of a head's channels rotate together: (2i, 2i+1) or (i, i + rotary/2)."""

    NORM = "norm"
    NEOX = "neox"


class ActivationFunction(StrEnum):
    """silu: x / (1 + exp(-x)); gelu: x * (1 + erf(x / sqrt(2))) / 2, or the same with
    tanh(sqrt(2 / pi) * (x + 0.044715 x^3)) for erf. Kernels have the names of the values."""

    SILU = "silu"
    GELU_ERF = "gelu_erf"
    GELU_TANH = "gelu_tanh"


class Gating(StrEnum):
    """How a router's logits become weights of experts: softmax or sigmoid of all logits, then the choice; or the choice
    by logits, then softmax of the chosen ones."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SOFTMAX_OF_CHOSEN = "softmax_of_chosen"


class GatedActivation(StrEnum):
    """What experts make of gate and up. silu_mul: silu(gate) * up; clamped_swiglu: g / (1 + exp(-1.702 g)) * (u + 1)
    with g = min(gate, 7) and u = up between -7 and 7. Kernels have the names of the values."""

    SILU_MUL = "silu_mul"
    CLAMPED_SWIGLU = "clamped_swiglu"


SWIGLU_LIMIT = 7.0
"""Of clamped_swiglu; 1.702 is part of the kernels."""

LEAST_WEIGHT_SUM = 2.0**-14
"""Weights of chosen experts are divided by no smaller sum."""
