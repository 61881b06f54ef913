"""Granite 4 with Mamba 2: granitehybrid. Layers with KV heads have attention. The other layers have Mamba 2."""

from __future__ import annotations

from llamaclust.model.architectures.granite import GraniteScales, granite_attention, granite_experts
from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.architectures.recurrent.mamba import mamba, read_mamba_shape


def granite_hybrid(builder: ProgramBuilder) -> None:
    hp, scales, shape = builder.hyperparameters, GraniteScales.of(builder.keys), read_mamba_shape(builder.keys)
    attention, experts = granite_attention(builder, scales), granite_experts(builder.keys)
    builder.scale_residuals(scales.residual)
    for layer in builder.layers(scales.embedding, logit_factor=scales.logits):
        if hp.head_counts_kv[layer]:
            builder.attention(layer, attention)
        else:
            builder.mix(layer, mamba(builder, layer, shape))
        if hp.expert_count:
            builder.experts(layer, experts)
        else:
            builder.feed_forward(layer)
