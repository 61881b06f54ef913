"""OLMo 2 and 3. The only norms are after attention and after the feed-forward network."""

from __future__ import annotations

import numpy as np

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.rotation import local_base, rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT

_PERIOD = 4
_BASE = 500000.0


def build(model: ConvertedModel) -> None:
    _build(model, None)


def build_olmo3(model: ConvertedModel) -> None:
    """Converts OLMo 3, which is OLMo 2 with a window in three of four layers."""
    settings = model.settings
    _build(model, _BASE)
    base = model.metadata["olmo2.rope.freq_base"]
    local = local_base(settings, settings.real("rope_theta", default=_BASE, minimum=1.0))
    if local != base:
        raise settings.error(
            "rope_parameters", f"expected one base, found {local:g} for layers with a window and {base} for others"
        )
    model.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
    model.key("attention.sliding_window_pattern", np.array(decoder.windowed_layers(model, _PERIOD), np.bool_))


def _build(model: ConvertedModel, base: float | None) -> None:
    settings, hidden = model.settings, model.width
    if settings.has("clip_qkv"):
        raise settings.error("clip_qkv", f"{settings.shown('clip_qkv')} is not supported: olmo2 does not clip")
    width = decoder.feed_forward_width(model)
    decoder.usual_keys(model, width)
    decoder.rms_epsilon(model, default=1e-5)
    rotation(model, model.head_width, base=base)
    model.copy("token_embd", "model.embed_tokens", model.words, hidden)
    model.copy("output_norm", "model.norm", hidden)
    model.output()
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        decoder.attention(model, layer)
        model.copy(f"{place}.attn_q_norm", f"{source}.self_attn.q_norm", model.heads * model.head_width)
        model.copy(f"{place}.attn_k_norm", f"{source}.self_attn.k_norm", model.kv_heads * model.head_width)
        model.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", hidden)
        decoder.feed_forward(model, layer, width)
        model.copy(f"{place}.post_ffw_norm", f"{source}.post_feedforward_layernorm", hidden)
