"""The shapes of small models of random weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.model.gguf.writer import WritableValue
from llamaclust.model.quant_types import QuantType
from support.models.tiny.delta_net import DeltaNet, KimiDelta
from support.models.tiny.latent import Latent
from support.models.tiny.mamba import Mamba


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model: its shape, which tensors it has, and keys (without the architecture's name) beside those of its shape.

    `context`: tokens that it is set up for, here and in llama.cpp.
    """

    architecture: str
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    experts: int = 0
    shared_ffn: int = 0
    biases: tuple[str, ...] = ()  # of which products in a layer
    used: int = 3  # of the experts
    expert_type: QuantType = QuantType.F32
    expert_biases: bool = False  # of router and experts
    selection_bias: bool = False
    expert_width: int = 0  # channels that experts read, where they are not those of the hidden state
    shared_gate: bool = True
    dense: int = 0  # leading layers without experts
    expert_period: int = 1  # of the others, every so many have experts
    fused: bool = False  # q, k and v in one tensor; gate and up in one
    sinks: bool = False
    head_norms: bool = False
    whole_norms: bool = False  # of q and k
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")  # of a layer
    post_norms: bool = False
    tied: bool = False
    layer_norms: tuple[str, ...] = ()  # in place of `norms`, with a mean and a bias
    norm_biases: bool = True
    positions: bool = False
    plain: bool = False  # no gate in the feed-forward network
    latent: Latent | None = None  # in place of other attention
    factors: tuple[str, ...] = ()
    context: int = 256
    taps: int = 0  # of the convolutions
    convolutions: tuple[int, ...] = ()  # layers with them in place of attention
    delta: DeltaNet | KimiDelta | None = None  # behind the convolutions
    gated: bool = False  # attention, channel by channel
    mamba: Mamba | None = None
    attention_beside: bool = False  # of Mamba's blocks, not in other layers
    single_blocks: tuple[int, ...] | None = None  # layers that are feed-forward networks; others have none
    last_norm: str = "output_norm"
    nextn: int = 0  # of the layers, the last ones: MTP heads
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
