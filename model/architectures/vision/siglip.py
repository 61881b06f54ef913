"""Encoders with SigLIP's layers: learned positions, LayerNorm before blocks, and attention to all patches."""

from __future__ import annotations

from llamaclust.model import program as steps
from llamaclust.model.architectures.vision.layers import VisionBuilder
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction

_PROJECTION, _SOFT_NORM, _INPUT_NORM = "mm.input_projection", "mm.soft_emb_norm", "mm.input_norm"
_INPUT_NORM_EPSILON = 1e-5  # PyTorch's default.


def idefics3(builder: VisionBuilder) -> Buffer:
    """Builds Idefics 3 and SmolVLM. Groups of patches are joined (pixel shuffle) and projected to the text width."""
    _layers(builder)
    merged = builder.merge(builder.hidden)
    out = Buffer("rows", builder.width("mm.model.fc"))
    builder.append(builder.product("mm.model.fc", merged, out))
    return out


def gemma3(builder: VisionBuilder) -> Buffer:
    """Builds Gemma 3's encoder. The mean of each group of patches is normed and projected to the text model's width."""
    _layers(builder)
    hidden = builder.hidden
    pooled, out = Buffer("pooled", hidden.width), Buffer("rows", builder.width(_PROJECTION))
    builder.append(steps.MeanRows(hidden, pooled, builder.hyperparameters.merged))
    builder.rms = True
    builder.norm(_SOFT_NORM, pooled, pooled)
    builder.append(builder.product(_PROJECTION, pooled, out))
    return out


def lfm2(builder: VisionBuilder) -> Buffer:
    """Builds LFM2-VL (SigLIP 2). Positions are interpolated and patches are grouped. Some models norm the groups."""
    _layers(builder)
    merged = builder.merge(builder.hidden)
    if builder.has(f"{_INPUT_NORM}.weight"):
        builder.norm(_INPUT_NORM, merged, merged, epsilon=_INPUT_NORM_EPSILON)
    return builder.perceptron(merged, ("mm.1", "mm.2"), ActivationFunction.GELU_ERF, "rows")


def _layers(builder: VisionBuilder) -> None:
    builder.embed()
    for layer in range(builder.hyperparameters.block_count):
        builder.attention(layer)
        builder.feed_forward(layer)
    builder.norm("v.post_ln", builder.hidden, builder.hidden)
