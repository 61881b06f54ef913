"""qwen2moe: Qwen 1.5 and 2 with experts. Beside the chosen ones, each layer has an expert that every token uses."""

from __future__ import annotations

from llamaclust.model.architectures.layers import ProgramBuilder
from llamaclust.model.program import Program, RopeStyle


def build(page: ProgramBuilder) -> Program:
    """The weights of the chosen experts are their probabilities among all, not normalized; the shared expert's is a
    sigmoid of its own. Biases on q, k and v as of qwen2."""
    hp = page.hyperparameters
    shared = page.keys.count("expert_shared_feed_forward_length", hp.feed_forward_length, maximum=1 << 20)
    table = page.rope_table()
    page.embed()
    for layer in range(page.start, page.end):
        page.require(layer, "attn_q.bias", "attn_k.bias", "attn_v.bias")
        page.attention(layer, RopeStyle.NEOX, table)
        page.experts(layer, normalized=False, shared_width=shared)
    page.head()
    return page.program()
