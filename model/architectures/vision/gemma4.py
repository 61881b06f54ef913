"""The encoder of Gemma 4. It has norms before and after blocks, and a table of positions for each axis."""

from __future__ import annotations

import math

from llamaclust.model import program as steps
from llamaclust.model.architectures.vision.attention import Rotation, VisionAttention
from llamaclust.model.architectures.vision.layers import VisionBuilder
from llamaclust.model.architectures.vision.rotations import HEIGHT, WIDTH, frequencies
from llamaclust.model.program import Buffer, RopeTable
from llamaclust.model.steps.options import RopeStyle

_ROPE_BASE = 100.0
_PROJECTION = "mm.input_projection"
STANDARD_BIAS, STANDARD_SCALE = "v.std_bias", "v.std_scale"


def gemma4v(builder: VisionBuilder) -> Buffer:
    """Builds Gemma 4's encoder. RoPE rotates a head's first half by the patch's column, and the second by its row."""
    builder.rms = True
    hp = builder.hyperparameters
    each = frequencies(hp.head_dim // 2, _ROPE_BASE)
    sections = (WIDTH,) * len(each) + (HEIGHT,) * len(each)
    variant = VisionAttention(
        Rotation(RopeStyle.NEOX, RopeTable(each), sections, split=True), scale=1.0, unit_values=True
    )
    builder.embed()
    for layer in range(hp.block_count):
        builder.attention(layer, variant)
        builder.feed_forward(layer)
    pooled, out = Buffer("pooled", hp.embedding_length), Buffer("rows", builder.width(_PROJECTION))
    builder.append(steps.MeanRows(builder.hidden, pooled, hp.merged))
    builder.append(steps.Scale(pooled, pooled, math.sqrt(hp.embedding_length)))
    if builder.has(STANDARD_BIAS):
        _standardize(builder, pooled)
    builder.append(steps.RmsNorm(pooled, pooled, None, hp.epsilon), builder.product(_PROJECTION, pooled, out))
    return out


def _standardize(builder: VisionBuilder, x: Buffer) -> None:
    negative, shifted = Buffer("negative", x.width), Buffer("shifted", x.width)
    bias = builder.floats(STANDARD_BIAS, (1, x.width))
    builder.append(
        steps.Scale(x, negative, -1.0),
        steps.AddRow(negative, shifted, bias, 0),
        steps.Scale(shifted, x, -1.0),
        steps.ScaleByWeight(x, x, builder.vector(STANDARD_SCALE, x.width), by_channel=True),
    )
