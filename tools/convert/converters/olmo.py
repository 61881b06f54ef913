"""OLMo 2 and 3. The only norms are after attention and after the feed-forward network."""

from __future__ import annotations

import numpy as np

from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import local_base, rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT

_PERIOD = 4
_BASE = 500000.0


def build(page: Page) -> None:
    _build(page, None)


def build_olmo3(page: Page) -> None:
    """Converts OLMo 3, which is OLMo 2 with a window in three of four layers."""
    settings = page.settings
    _build(page, _BASE)
    base = page.metadata["olmo2.rope.freq_base"]
    local = local_base(settings, settings.real("rope_theta", default=_BASE, minimum=1.0))
    if local != base:
        raise settings.error(
            "rope_parameters", f"layers with a window have base {local:g}, but other layers have {base}"
        )
    page.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
    page.key("attention.sliding_window_pattern", np.array(decoder.windowed_layers(page, _PERIOD), np.bool_))


def _build(page: Page, base: float | None) -> None:
    settings, hidden = page.settings, page.width
    if settings.has("clip_qkv"):
        raise settings.error("clip_qkv", f"{settings.shown('clip_qkv')} is not supported: olmo2 does not clip")
    width = decoder.feed_forward_width(page)
    decoder.usual_keys(page, width)
    decoder.rms_epsilon(page, default=1e-5)
    rotation(page, page.head_width, base=base)
    page.copy("token_embd", "model.embed_tokens", page.words, hidden)
    page.copy("output_norm", "model.norm", hidden)
    page.output()
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        decoder.attention(page, layer)
        page.copy(f"{place}.attn_q_norm", f"{source}.self_attn.q_norm", page.heads * page.head_width)
        page.copy(f"{place}.attn_k_norm", f"{source}.self_attn.k_norm", page.kv_heads * page.head_width)
        page.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", hidden)
        decoder.feed_forward(page, layer, width)
        page.copy(f"{place}.post_ffw_norm", f"{source}.post_feedforward_layernorm", hidden)
