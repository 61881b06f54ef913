"""Models whose blocks have norms only after their linear layers: olmo2 (OLMo 2 and 3), exaone4."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.model.architectures.layers import AttentionVariant, HeadNorms, Norms, ProgramBuilder
from llamaclust.model.hyperparameters import RopeScaling
from llamaclust.model.steps.options import RopeStyle

_PERIOD = 4
_EXAONE4_32B_LAYERS, _EXAONE4_32B_WINDOW = 64, 4096


def olmo2(builder: ProgramBuilder) -> None:
    """Builds OLMo 2 and 3. Norms of q and k cover all heads. In OLMo 3, RoPE is unscaled in layers with a window."""
    hp = builder.hyperparameters
    windowed = builder.keys.windowed_layers(hp.block_count, _PERIOD) if hp.sliding_window else [False] * hp.block_count
    unscaled = replace(hp.rope, scaling=RopeScaling.NONE, factor=1.0, attention_factor=1.0)
    tables = {True: builder.rope_table(unscaled), False: builder.rope_table()}
    for layer in builder.layers():
        window = hp.sliding_window if windowed[layer] else None
        variant = AttentionVariant(RopeStyle.NEOX, tables[windowed[layer]], window, head_norms=HeadNorms.WHOLE)
        builder.attention(layer, variant, norms=Norms.AFTER)
        builder.feed_forward(layer, norms=Norms.AFTER)


def exaone4(builder: ProgramBuilder) -> None:
    """Builds EXAONE 4. Each head of q and k is normed. In the 32B model, every fourth layer has no sliding window and
    no RoPE."""
    hp = builder.hyperparameters
    window = hp.sliding_window or (_EXAONE4_32B_WINDOW if hp.block_count == _EXAONE4_32B_LAYERS else None)
    windowed = builder.keys.windowed_layers(hp.block_count, _PERIOD)
    table = builder.rope_table()
    for layer in builder.layers():
        rotated = window is None or windowed[layer]
        variant = AttentionVariant(
            RopeStyle.NEOX,
            table if rotated else None,
            window if windowed[layer] else None,
            head_norms=HeadNorms.PER_HEAD,
        )
        builder.attention(layer, variant, norms=Norms.AFTER)
        builder.feed_forward(layer, norms=Norms.AFTER)
