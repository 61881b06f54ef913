"""LFM2: lfm2, lfm2moe. Layers with KV heads have attention. The other layers have short convolutions."""

from __future__ import annotations

from collections.abc import Iterator

from llamaclust.model import program as ir
from llamaclust.model.architectures.experts import read_experts
from llamaclust.model.architectures.layers import AttentionVariant, HeadNorms, ProgramBuilder
from llamaclust.model.program import KV_BLOCK_TOKENS, Buffer
from llamaclust.model.steps.options import Gating, RopeStyle
from llamaclust.model.steps.states import MAX_TAPS


def lfm2(builder: ProgramBuilder) -> None:
    """Builds LFM2. In models with experts, only the first `leading_dense_block_count` layers are dense."""
    hp, keys, table = builder.hyperparameters, builder.keys, builder.rope_table()
    taps = keys.count("shortconv.l_cache", minimum=2, maximum=MAX_TAPS)
    if hp.embedding_length % KV_BLOCK_TOKENS:
        raise keys.error("embedding_length", f"expected a multiple of {KV_BLOCK_TOKENS}, found {hp.embedding_length}")
    dense = keys.count("leading_dense_block_count", 0, minimum=0, maximum=hp.block_count)
    experts = read_experts(keys, hp, gating=Gating.SIGMOID) if hp.expert_count else None
    attention = AttentionVariant(RopeStyle.NEOX, table, hp.sliding_window, head_norms=HeadNorms.PER_HEAD)
    builder.last_norm = "token_embd_norm"
    for layer in builder.layers():
        if hp.head_counts_kv[layer]:
            builder.attention(layer, attention)
        else:
            builder.mix(layer, _short_convolution(builder, layer, taps))
        if experts is not None and layer >= dense:
            builder.require(layer, "exp_probs_b.bias")
            builder.experts(layer, experts)
        else:
            builder.feed_forward(layer)


def _short_convolution(builder: ProgramBuilder, layer: int, taps: int) -> Iterator[ir.Step]:
    """Yields the steps of output(c * convolution(b * x)). b, c and x are projections of the normed hidden state."""
    prefix, width = f"blk.{layer}", builder.hyperparameters.embedding_length
    normed, projected = (Buffer(name, width) for name in ("normed", "projected"))
    b, c, x = (Buffer(f"convolution {name}", width) for name in ("b", "c", "x"))
    yield from builder.product_parts(f"{prefix}.shortconv.in_proj", normed, (b, c, x))
    yield ir.Mul(b, x, b)
    weight = builder.weight(f"{prefix}.shortconv.conv.weight", (width, taps))
    yield ir.Convolution(b, x, weight, taps, layer)
    yield ir.Mul(x, c, c)
    yield builder.product(f"{prefix}.shortconv.out_proj", c, projected)
