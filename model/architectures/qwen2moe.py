"""qwen2moe: Qwen 1.5 and 2 with experts. Beside the chosen ones, each layer has an expert that every token uses."""

from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(builder: ProgramBuilder) -> Program:
    """The weights of the chosen experts are their probabilities among all, not normalized; the shared expert's is a
    sigmoid of its own. Biases on q, k and v as of qwen2."""
    hp = builder.hyperparameters
    shared = builder.keys.count("expert_shared_feed_forward_length", hp.feed_forward_length, maximum=1 << 20)
    table = builder.rope_table()
    builder.embed()
    for layer in range(builder.start, builder.end):
        builder.require(layer, "attn_q.bias", "attn_k.bias", "attn_v.bias")
        builder.attention(layer, AttentionVariant(RopeStyle.NEOX, table))
        builder.experts(layer, normalized=False, shared_width=shared)
    builder.head()
    return builder.program()
