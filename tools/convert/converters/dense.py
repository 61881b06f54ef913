"""Dense models that differ from LLaMA in details: seed_oss, ernie4_5, exaone4, granite, cohere2."""

from __future__ import annotations

import numpy as np

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT

_PERIOD = 4
_EXAONE4_32B_LAYERS = 64
_MAX_SCALE = 1e6


def build_seed_oss(model: ConvertedModel) -> None:
    for name in ("attention_out_bias", "mlp_bias"):
        if model.settings.flag(name):
            raise model.settings.error(name, "true is not supported by seed_oss")
    width = decoder.feed_forward_width(model)
    decoder.usual_keys(model, width)
    decoder.rms_epsilon(model)
    rotation(model, model.head_width, base=1e7)
    decoder.ends(model)
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        model.copy(f"{place}.attn_norm", f"{source}.input_layernorm", model.width)
        model.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", model.width)
        decoder.attention(model, layer)
        decoder.feed_forward(model, layer, width)


def build_ernie4_5(model: ConvertedModel) -> None:
    if model.settings.flag("use_bias"):
        raise model.settings.error("use_bias", "true is not supported by ernie4_5")
    _plain(model, base=500000.0)


def build_granite(model: ConvertedModel) -> None:
    settings = model.settings
    if settings.flag("mlp_bias"):
        raise settings.error("mlp_bias", "true is not supported by granite")
    granite_scales(model)
    _plain(model, base=10000.0)


def granite_scales(model: ConvertedModel) -> None:
    for key, name in (
        ("embedding_scale", "embedding_multiplier"),
        ("attention.scale", "attention_multiplier"),
        ("residual_scale", "residual_multiplier"),
        ("logit_scale", "logits_scaling"),
    ):
        model.key(key, model.settings.real(name, default=1.0, minimum=1e-6, maximum=_MAX_SCALE))


def _plain(model: ConvertedModel, base: float) -> None:
    width = decoder.feed_forward_width(model)
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model)
    rotation(model, model.head_width, base=base)
    decoder.ends(model)
    for layer in range(model.layers):
        decoder.norms(model, layer)
        decoder.attention(model, layer)
        decoder.feed_forward(model, layer, width)


def build_exaone4(model: ConvertedModel) -> None:
    """Converts EXAONE 4, in which norms follow attention and the feed-forward network, and do not precede them."""
    settings, hidden = model.settings, model.width
    width = decoder.feed_forward_width(model)
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model)
    rotation(model, model.head_width, base=1e6)
    if settings.has("sliding_window"):
        model.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
        model.key("attention.sliding_window_pattern", np.array(decoder.windowed_layers(model, _PERIOD), np.bool_))
    elif model.layers == _EXAONE4_32B_LAYERS:
        raise settings.error("sliding_window", f"missing; an exaone4 model with {model.layers} layers (32B) needs it")
    model.copy("token_embd", "model.embed_tokens", model.words, hidden)
    model.copy("output_norm", "model.norm", hidden)
    model.output()
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        decoder.attention(model, layer)
        for part in ("q", "k"):
            model.copy(f"{place}.attn_{part}_norm", f"{source}.self_attn.{part}_norm", model.head_width)
        model.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", hidden)
        decoder.feed_forward(model, layer, width)
        model.copy(f"{place}.post_ffw_norm", f"{source}.post_feedforward_layernorm", hidden)


def build_cohere2(model: ConvertedModel) -> None:
    """Converts Command R7B and Command A, whose attention and feed-forward network are parallel."""
    settings, hidden = model.settings, model.width
    width = decoder.feed_forward_width(model)
    if settings.real("rotary_pct", default=1.0) != 1:
        raise settings.error("rotary_pct", f"{settings.shown('rotary_pct')} is not supported; expected 1")
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.norm_epsilon(model, "layer_norm_eps")
    model.key("logit_scale", settings.real("logit_scale", minimum=1e-6, maximum=_MAX_SCALE))
    model.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
    windowed = decoder.windowed_layers(model, _PERIOD)
    if windowed != [(layer + 1) % _PERIOD != 0 for layer in range(model.layers)]:
        model.key("attention.sliding_window_pattern", np.array(windowed, np.bool_))
    rotation(model, model.head_width)
    model.copy("token_embd", "model.embed_tokens", model.words, hidden)
    model.copy("output_norm", "model.norm", hidden)
    model.output(tied=True)
    for layer in range(model.layers):
        model.copy(f"blk.{layer}.attn_norm", f"model.layers.{layer}.input_layernorm", hidden)
        decoder.attention(model, layer)
        decoder.feed_forward(model, layer, width)
