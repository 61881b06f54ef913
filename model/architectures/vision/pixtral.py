"""The encoder of Pixtral, Mistral Small 3.1 and later models. It has RMS norms, gates, and RoPE."""

from __future__ import annotations

from llamaclust.model.architectures.vision.attention import VisionAttention
from llamaclust.model.architectures.vision.layers import VisionBuilder
from llamaclust.model.architectures.vision.rotations import HEIGHT, WIDTH, alternating
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction, RopeStyle

_ROPE_BASE = 10000.0
_MERGER = "mm.patch_merger"


def pixtral(builder: VisionBuilder) -> Buffer:
    """Builds Pixtral's encoder. Rows of Q and K are permuted, so that RoPE pairs adjacent channels. Newer models merge
    patches."""
    builder.rms = True
    hp = builder.hyperparameters
    rotation = alternating(hp.head_dim, _ROPE_BASE, RopeStyle.NORM, (HEIGHT, WIDTH))
    builder.embed()
    for layer in range(hp.block_count):
        builder.attention(layer, VisionAttention(rotation))
        builder.feed_forward(layer)
    rows = builder.hidden
    if builder.has(f"{_MERGER}.weight"):
        builder.norm("mm.input_norm", rows, rows)
        merged, rows = builder.merge(rows), Buffer("joined", hp.embedding_length)
        builder.append(builder.product(_MERGER, merged, rows))
    return builder.perceptron(rows, ("mm.1", "mm.2"), ActivationFunction.GELU_ERF, "rows")
