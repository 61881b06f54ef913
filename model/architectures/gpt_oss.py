from __future__ import annotations

from dataclasses import replace

from llamaclust.model.architectures.experts import read_experts
from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.steps.options import GatedActivation, Gating, RopeStyle

_PERIOD = 2
_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def gpt_oss(builder: ProgramBuilder) -> None:
    """Builds gpt-oss, with biases, attention sinks, a sliding window in every second layer, and experts with a clamped
    SwiGLU."""
    hp, keys = builder.hyperparameters, builder.keys
    if hp.sliding_window is None:
        raise keys.error("attention.sliding_window", "missing")
    windowed = keys.windowed_layers(hp.block_count, _PERIOD)
    base = keys.real("rope.freq_base_swa", hp.rope.frequency_base, minimum=1.0, maximum=1e12)
    tables = {True: builder.rope_table(replace(hp.rope, frequency_base=base)), False: builder.rope_table()}
    clamped = GatedActivation.CLAMPED_SWIGLU
    experts = read_experts(keys, hp, gating=Gating.SOFTMAX_OF_CHOSEN, normalized=False, activation=clamped)
    for layer in builder.layers():
        builder.require(layer, *(f"{name}.bias" for name in _BIASES))
        window = hp.sliding_window if windowed[layer] else None
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, tables[windowed[layer]], window, sinks=True))
        builder.experts(layer, experts, norm="post_attention_norm")
