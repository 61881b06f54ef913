"""Encoders with interpolated tables of positions and with RoPE: GLM-4V, Kimi VL."""

from __future__ import annotations

from llamaclust.model import program as steps
from llamaclust.model.architectures.vision.attention import Rotation, VisionAttention
from llamaclust.model.architectures.vision.layers import VisionBuilder
from llamaclust.model.architectures.vision.rotations import HEIGHT, WIDTH, frequencies, halves
from llamaclust.model.program import Buffer, RopeTable
from llamaclust.model.steps.options import ActivationFunction, RopeStyle

_ROPE_BASE = 10000.0
_MERGER_EPSILON = 1e-5  # PyTorch's default.
_MERGER = "mm.patch_merger"


def glm4v(builder: VisionBuilder) -> Buffer:
    """Builds GLM-4.1V and later, and GLM-OCR. Patches are merged by a convolution. GLM-4V norms patches and then adds
    positions; GLM-OCR has neither."""
    builder.rms = True
    hp = builder.hyperparameters
    rotation = halves(hp.head_dim, _ROPE_BASE, RopeStyle.NEOX, (HEIGHT, WIDTH))
    builder.embed(norm="v.norm_embd" if hp.added_width else None)
    for layer in range(hp.block_count):
        builder.attention(layer, VisionAttention(rotation))
        builder.feed_forward(layer)
    builder.norm("v.post_ln", builder.hidden, builder.hidden)
    merged, joined = builder.merge(builder.hidden), Buffer("joined", builder.width(_MERGER))
    builder.append(builder.product(_MERGER, merged, joined))
    return _gated(builder, joined)


def _gated(builder: VisionBuilder, x: Buffer) -> Buffer:
    projected = Buffer("first", builder.width("mm.model.fc"))
    builder.append(builder.product("mm.model.fc", x, projected))
    builder.rms = False
    builder.norm("mm.post_norm", projected, projected, epsilon=_MERGER_EPSILON)
    gate, up = Buffer("merger gate", builder.width("mm.gate")), Buffer("merger up", builder.width("mm.up"))
    out = Buffer("rows", builder.width("mm.down"))
    builder.append(
        steps.Activate(projected, projected, ActivationFunction.GELU_ERF),
        builder.product("mm.gate", projected, gate),
        builder.product("mm.up", projected, up),
        steps.SiluMul(gate, up, gate),
        builder.product("mm.down", gate, out),
    )
    return out


def kimivl(builder: VisionBuilder) -> Buffer:
    """Builds Kimi VL (MoonViT). RoPE rotates even channel pairs by the patch's column, and odd pairs by its row."""
    hp = builder.hyperparameters
    each = frequencies(hp.head_dim // 2, _ROPE_BASE)
    table = RopeTable(tuple(frequency for frequency in each for _ in range(2)))
    rotation = Rotation(RopeStyle.NORM, table, (WIDTH, HEIGHT) * len(each))
    builder.embed()
    for layer in range(hp.block_count):
        builder.attention(layer, VisionAttention(rotation))
        builder.feed_forward(layer)
    builder.norm("v.post_ln", builder.hidden, builder.hidden)
    builder.norm("mm.input_norm", builder.hidden, builder.hidden, epsilon=_MERGER_EPSILON)
    merged = builder.merge(builder.hidden)
    return builder.perceptron(merged, ("mm.1", "mm.2"), ActivationFunction.GELU_ERF, "rows")
