"""Dense models that differ from LLaMA in details: seed_oss, ernie4_5, exaone4, granite, cohere2."""

from __future__ import annotations

import numpy as np

from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT

_PERIOD = 4
_EXAONE4_32B_LAYERS = 64
_MAX_SCALE = 1e6


def build_seed_oss(page: Page) -> None:
    for name in ("attention_out_bias", "mlp_bias"):
        if page.settings.flag(name):
            raise page.settings.error(name, "true is not supported by seed_oss")
    width = decoder.feed_forward_width(page)
    decoder.usual_keys(page, width)
    decoder.rms_epsilon(page)
    rotation(page, page.head_width, base=1e7)
    decoder.ends(page)
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        page.copy(f"{place}.attn_norm", f"{source}.input_layernorm", page.width)
        page.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", page.width)
        decoder.attention(page, layer)
        decoder.feed_forward(page, layer, width)


def build_ernie4_5(page: Page) -> None:
    if page.settings.flag("use_bias"):
        raise page.settings.error("use_bias", "true is not supported by ernie4_5")
    _plain(page, base=500000.0)


def build_granite(page: Page) -> None:
    settings = page.settings
    if settings.flag("mlp_bias"):
        raise settings.error("mlp_bias", "true is not supported by granite")
    granite_scales(page)
    _plain(page, base=10000.0)


def granite_scales(page: Page) -> None:
    for key, name in (
        ("embedding_scale", "embedding_multiplier"),
        ("attention.scale", "attention_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
    ):
        page.key(key, page.settings.real(name, default=1.0, minimum=1e-6, maximum=_MAX_SCALE))


def _plain(page: Page, base: float) -> None:
    width = decoder.feed_forward_width(page)
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page)
    rotation(page, page.head_width, base=base)
    decoder.ends(page)
    for layer in range(page.layers):
        decoder.norms(page, layer)
        decoder.attention(page, layer)
        decoder.feed_forward(page, layer, width)


def build_exaone4(page: Page) -> None:
    """Converts EXAONE 4, which has norms only after blocks."""
    settings, hidden = page.settings, page.width
    width = decoder.feed_forward_width(page)
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page)
    rotation(page, page.head_width, base=1e6)
    if settings.has("sliding_window"):
        page.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
        page.key("attention.sliding_window_pattern", np.array(decoder.windowed_layers(page, _PERIOD), np.bool_))
    elif page.layers == _EXAONE4_32B_LAYERS:
        raise settings.error(
            "sliding_window", f"missing; exaone4 needs it with {page.layers} layers, as in its 32B model"
        )
    page.copy("token_embd", "model.embed_tokens", page.words, hidden)
    page.copy("output_norm", "model.norm", hidden)
    page.output()
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        decoder.attention(page, layer)
        for part in ("q", "k"):
            page.copy(f"{place}.attn_{part}_norm", f"{source}.self_attn.{part}_norm", page.head_width)
        page.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", hidden)
        decoder.feed_forward(page, layer, width)
        page.copy(f"{place}.post_ffw_norm", f"{source}.post_feedforward_layernorm", hidden)


def build_cohere2(page: Page) -> None:
    """Converts Command R7B and Command A, whose attention and feed-forward network are parallel."""
    settings, hidden = page.settings, page.width
    width = decoder.feed_forward_width(page)
    if settings.real("rotary_pct", default=1.0) != 1:
        raise settings.error("rotary_pct", f"{settings.shown('rotary_pct')} is not supported; supported is 1")
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.norm_epsilon(page, "layer_norm_eps")
    page.key("logit_scale", settings.real("logit_scale", minimum=1e-6, maximum=_MAX_SCALE))
    page.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
    windowed = decoder.windowed_layers(page, _PERIOD)
    if windowed != [(layer + 1) % _PERIOD != 0 for layer in range(page.layers)]:
        page.key("attention.sliding_window_pattern", np.array(windowed, np.bool_))
    rotation(page, page.head_width)
    page.copy("token_embd", "model.embed_tokens", page.words, hidden)
    page.copy("output_norm", "model.norm", hidden)
    page.output(tied=True)
    for layer in range(page.layers):
        page.copy(f"blk.{layer}.attn_norm", f"model.layers.{layer}.input_layernorm", hidden)
        decoder.attention(page, layer)
        decoder.feed_forward(page, layer, width)
