"""Options of steps: RoPE, activations and gatings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RopeStyle(StrEnum):
    """The pairs of channels that RoPE rotates in each head. NORM: (2i, 2i + 1). NEOX: (i, i + rotated channels / 2)."""

    NORM = "norm"
    NEOX = "neox"


class ActivationFunction(StrEnum):
    """Activation functions. Their values are kernel names.

    silu: x / (1 + exp(-x)). sigmoid: 1 / (1 + exp(-x)). gelu_quick: x / (1 + exp(-1.702 x)).
    gelu_erf: x * (1 + erf(x / sqrt(2))) / 2. relu_squared: max(x, 0)^2.
    gelu_tanh: x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2."""

    SILU = "silu"
    GELU_ERF = "gelu_erf"
    GELU_TANH = "gelu_tanh"
    GELU_QUICK = "gelu_quick"
    SIGMOID = "sigmoid"
    RELU_SQUARED = "relu_squared"


class Gating(StrEnum):
    """The function that converts a router's logits to expert weights. SOFTMAX and SIGMOID apply to all logits, before
    experts are chosen. SOFTMAX_OF_CHOSEN chooses experts by logits, and applies the softmax to the chosen logits."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SOFTMAX_OF_CHOSEN = "softmax_of_chosen"


class GatedActivation(StrEnum):
    """Activations with a gate. silu_mul: silu(gate) * up. gelu_mul: gelu_tanh(gate) * up. clamped_swiglu: g / (1 +
    exp(-1.702 g)) * (u + 1), where g = min(gate, 7), and u is up clamped to [-7, 7]."""

    SILU_MUL = "silu_mul"
    GELU_MUL = "gelu_mul"
    CLAMPED_SWIGLU = "clamped_swiglu"


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """Options of the step `Moe`. If `weighs_inputs`, weights multiply the experts' inputs instead of their results."""

    gating: Gating = Gating.SOFTMAX
    normalized: bool = True
    scale: float = 1.0
    groups: int = 1
    used_groups: int = 1
    activation: ActivationFunction | GatedActivation = GatedActivation.SILU_MUL
    weighs_inputs: bool = False


USUAL_EXPERTS = ExpertOptions()

SWIGLU_LIMIT = 7.0
"""The limit of clamped_swiglu. The kernels have clamped_swiglu's factor 1.702 as a constant."""

LEAST_WEIGHT_SUM = 2.0**-14
