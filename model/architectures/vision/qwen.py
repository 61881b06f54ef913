"""The encoders of Qwen 2.5 VL and Qwen 3 VL. They have RoPE by row and column, and merge 2 x 2 patches."""

from __future__ import annotations

from collections.abc import Iterator

from llamaclust.model import program as steps
from llamaclust.model.architectures.vision.attention import Rotation, VisionAttention
from llamaclust.model.architectures.vision.layers import VisionBuilder
from llamaclust.model.architectures.vision.rotations import HEIGHT, WIDTH, halves
from llamaclust.model.model_keys import ModelKeys
from llamaclust.model.program import Buffer
from llamaclust.model.steps.options import ActivationFunction, RopeStyle

_ROPE_BASE = 10000.0
_MERGER = ("mm.0", "mm.2")


def qwen25vl(builder: VisionBuilder) -> Buffer:
    """Builds Qwen 2.5 VL, with RMS norms and gates. All layers have windows, except every `n_wa_pattern`-th layer."""
    builder.rms = True
    layers = builder.hyperparameters.block_count
    period = ModelKeys(builder.model).count("vision.n_wa_pattern", minimum=0, maximum=1 << 10)
    rotation = _rotation(builder)
    builder.embed()
    for layer in range(layers):
        builder.attention(layer, VisionAttention(rotation, grouped=period > 0 and (layer + 1) % period > 0))
        builder.feed_forward(layer)
    builder.norm("v.post_ln", builder.hidden, builder.hidden)
    return builder.perceptron(builder.merge(builder.hidden), _MERGER, ActivationFunction.GELU_ERF, "rows")


def qwen3vl(builder: VisionBuilder) -> Buffer:
    """Builds the encoder of Qwen 3 VL. Norms subtract the mean, and positions are interpolated. The results of some
    inner layers are also projected, and the first layers of the text model add them to the hidden state (DeepStack)."""
    layers = builder.hyperparameters.block_count
    kept: list[tuple[int, Buffer]] = []
    rotation = _rotation(builder)
    builder.embed()
    for layer in range(layers):
        is_kept = builder.has(f"v.deepstack.{layer}.fc1.weight")
        builder.attention(layer, VisionAttention(rotation))
        builder.feed_forward(layer, out=Buffer(f"hidden {layer}", builder.hidden.width) if is_kept else None)
        if is_kept:
            kept.append((layer, builder.hidden))
    last = Buffer("last", builder.hidden.width)
    builder.norm("v.post_ln", builder.hidden, last)
    levels = _merged(builder, [last, *(hidden for _, hidden in kept)])
    rows = builder.perceptron(next(levels), _MERGER, ActivationFunction.GELU_ERF, "rows")
    width = rows.width
    for (layer, _), merged in zip(kept, levels, strict=True):
        rows = _joined(builder, rows, _level(builder, layer, merged, width))
    return rows


def _level(builder: VisionBuilder, layer: int, merged: Buffer, width: int) -> Buffer:
    prefix = f"v.deepstack.{layer}"
    builder.weight(f"{prefix}.fc2.weight", (width, builder.width(f"{prefix}.fc1")))
    builder.norm(f"{prefix}.norm", merged, merged)
    return builder.perceptron(merged, (f"{prefix}.fc1", f"{prefix}.fc2"), ActivationFunction.GELU_ERF, "level")


def _joined(builder: VisionBuilder, rows: Buffer, level: Buffer) -> Buffer:
    joined = Buffer(f"{rows.name} and {level.name}", rows.width + level.width)
    builder.append(steps.Join(rows, level, joined))
    return joined


def _merged(builder: VisionBuilder, parts: list[Buffer]) -> Iterator[Buffer]:
    """Yields each buffer with its patches merged. The next buffer overwrites the previous one."""
    if len(parts) == 1:
        yield builder.merge(parts[0])
        return
    whole, width, factor = parts[0], parts[0].width, builder.hyperparameters.merged
    for part in parts[1:]:
        whole = _joined(builder, whole, part)
    together, merged = builder.merge(whole), Buffer("merged part", factor * width)
    for number in range(len(parts)):
        builder.append(steps.Slice(together, merged, number * width, factor))
        yield merged


def _rotation(builder: VisionBuilder) -> Rotation:
    return halves(builder.hyperparameters.head_dim, _ROPE_BASE, RopeStyle.NEOX, (HEIGHT, WIDTH))
