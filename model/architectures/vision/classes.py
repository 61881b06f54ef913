"""Encoders with a class embedding, which is one row for the whole tile: InternVL and Llama 4. The input has the rows of
the patches, the class row, and rows of zeros that fill up the last merge group."""

from __future__ import annotations

from llamaclust.model import program as steps
from llamaclust.model.architectures.vision.attention import VisionAttention
from llamaclust.model.architectures.vision.layers import VisionBuilder
from llamaclust.model.architectures.vision.rotations import HEIGHT, WIDTH, halves
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction, RopeStyle

_ROPE_BASE = 10000.0
_PROJECTOR_EPSILON = 1e-5  # PyTorch's default.
_LARGE = (3200, 45)
"""The width and layer count of InternViT 6B, which has RMS norms. Files do not state the kind of norm."""


def internvl(builder: VisionBuilder) -> Buffer:
    """Builds InternVL 2.5 to 3.5, with LayerScale. Groups of patches are merged, normed and projected."""
    hp = builder.hyperparameters
    builder.rms = (hp.embedding_length, hp.block_count) == _LARGE
    builder.embed(bias=False)
    for layer in range(hp.block_count):
        builder.attention(layer, VisionAttention(grouped=True))
        builder.feed_forward(layer)
    builder.rms = False
    merged = builder.merge(builder.hidden)
    builder.norm("mm.model.mlp.0", merged, merged, epsilon=_PROJECTOR_EPSILON)
    return builder.perceptron(merged, ("mm.model.mlp.1", "mm.model.mlp.3"), ActivationFunction.GELU_ERF, "rows")


def llama4(builder: VisionBuilder) -> Buffer:
    """Builds Llama 4. RoPE uses a patch's row and column, counted from 1. The projector has three linear layers. Some
    files name the norm before a feed-forward block as Gemma 4's norm after attention."""
    hp = builder.hyperparameters
    rotation = halves(hp.head_dim, _ROPE_BASE, RopeStyle.NORM, (WIDTH, HEIGHT))
    norm = "ln2" if builder.has("v.blk.0.ln2.weight") else "attn_post_norm"
    builder.embed(bias=False)
    for layer in range(hp.block_count):
        builder.attention(layer, VisionAttention(rotation, grouped=True, post_norm=False))
        builder.feed_forward(layer, norm=norm)
    builder.norm("v.post_ln", builder.hidden, builder.hidden)
    merged = builder.merge(builder.hidden)
    inner = builder.perceptron(merged, ("mm.model.mlp.1", "mm.model.mlp.2"), ActivationFunction.GELU_ERF, "adapted")
    out = Buffer("rows", builder.width("mm.model.fc"))
    builder.append(
        steps.Activate(inner, inner, ActivationFunction.GELU_ERF), builder.product("mm.model.fc", inner, out)
    )
    return out
