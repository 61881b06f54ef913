from __future__ import annotations

from llamaclust.model.architectures.layers import AttentionVariant, ProgramBuilder
from llamaclust.model.steps.options import ActivationFunction, RopeStyle

_PERIOD = 4
_MAX_SCALE = 1e6


def cohere2(builder: ProgramBuilder) -> None:
    """Builds Command R7B and Command A. Attention and feed-forward network are parallel. Every fourth layer has neither
    a sliding window nor RoPE."""
    hp, keys = builder.hyperparameters, builder.keys
    windowed = keys.windowed_layers(hp.block_count, _PERIOD)
    if hp.sliding_window is None:
        raise keys.error("attention.sliding_window", "missing")
    logit_scale = keys.real("logit_scale", minimum=1e-6, maximum=_MAX_SCALE)
    table = builder.rope_table()
    builder.use_layer_norms(biases=False)
    for layer in builder.layers(logit_factor=logit_scale):
        has_window = windowed[layer]
        variant = AttentionVariant(
            RopeStyle.NORM, table if has_window else None, hp.sliding_window if has_window else None
        )
        builder.parallel(layer, variant, ActivationFunction.SILU, gated=True)
