"""The shapes of small random models."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.model.gguf.writer import WritableValue
from llamaclust.model.quant_types import QuantType
from support.models.tiny.delta_net import DeltaNet, KimiDelta
from support.models.tiny.latent import Latent
from support.models.tiny.mamba import Mamba


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model's shape, its tensors, and further keys without the architecture's name. `context`: the model's tokens, in
    tests and in llama.cpp."""

    architecture: str
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    experts: int = 0
    shared_ffn: int = 0
    biases: tuple[str, ...] = ()  # the layer's products with biases
    used: int = 3  # experts per token
    expert_type: QuantType = QuantType.F32
    expert_biases: bool = False  # of the router and the experts
    selection_bias: bool = False
    expert_width: int = 0  # the experts' input channels, if not those of the hidden state
    shared_gate: bool = True
    dense: int = 0  # leading layers without experts
    expert_period: int = 1  # every n-th layer has experts, after the dense ones
    fused: bool = False  # q, k and v in one tensor; gate and up in one
    sinks: bool = False
    head_norms: bool = False
    whole_norms: bool = False  # norms of whole q and k, not of each head
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")  # the layer's RMS norms
    post_norms: bool = False
    tied: bool = False
    layer_norms: tuple[str, ...] = ()  # with mean and bias; they replace `norms`
    norm_biases: bool = True
    positions: bool = False
    plain: bool = False  # feed-forward networks without gates
    latent: Latent | None = None  # replaces other attention
    factors: tuple[str, ...] = ()
    context: int = 256
    taps: int = 0  # of each convolution
    convolutions: tuple[int, ...] = ()  # layers with convolutions instead of attention
    delta: DeltaNet | KimiDelta | None = None  # after the convolutions
    gated: bool = False  # attention with a gate per channel
    mamba: Mamba | None = None
    attention_beside: bool = False  # attention beside Mamba blocks instead of in other layers
    single_blocks: tuple[int, ...] | None = None  # layers with only a feed-forward network; others have none
    last_norm: str = "output_norm"
    nextn: int = 0  # number of last layers that are MTP heads
    keys: dict[str, WritableValue] = field(default_factory=dict)

    def attends(self, layer: int) -> bool:
        mixes = layer in self.convolutions or (self.mamba is not None and layer in self.mamba.layers)
        return self.attention_beside or not (mixes or layer in (self.single_blocks or ()))

    def has_inner(self, layer: int) -> bool:
        """Tells whether a layer has a feed-forward network or experts."""
        return self.single_blocks is None or layer in self.single_blocks

    def is_dense(self, layer: int) -> bool:
        """Tells whether a layer has no experts."""
        return not self.experts or layer < self.dense or (layer + 1) % self.expert_period != 0
