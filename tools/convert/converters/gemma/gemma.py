"""Gemma, Gemma 2 and Gemma 3. Their norms multiply by the stored weight plus one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.lazy import mapped
from llamaclust.tools.convert.rotation import local_base, rotation
from llamaclust.tools.convert.settings import MAX_CAP, MAX_CONTEXT, MAX_LAYERS

_ONE = np.float32(1)
_PERIODS = {"gemma2": 2, "gemma3": 6}
_LAYERS_27B = {"gemma2": 46, "gemma3": 62}


def build(model: ConvertedModel) -> None:
    width, settings = model.settings.count("intermediate_size"), model.settings
    decoder.activation(model, decoder.GELU, "hidden_activation", "hidden_act")
    decoder.usual_keys(model, width)
    model.key("attention.key_length", model.head_width)
    model.key("attention.value_length", model.head_width)
    decoder.rms_epsilon(model, default=1e-6)
    if model.architecture == "gemma3":
        rotation(model, model.head_width, base=1e6, says_dimensions=False)
        model.key("rope.freq_base_swa", local_base(settings))
    else:
        rotation(model, model.head_width, says_dimensions=False)
    if settings.flag("use_bidirectional_attention"):
        raise settings.error("use_bidirectional_attention", "true is not supported")
    if model.architecture != "gemma":
        _window(model)
        _caps(model)
        _check_scale(model)
    model.output(tied=True)
    model.copy("token_embd", "model.embed_tokens", model.words, model.width)
    _norm(model, "output_norm", "model.norm", model.width)
    for layer in range(model.layers):
        _norms(model, f"blk.{layer}", f"model.layers.{layer}")
        decoder.attention(model, layer)
        decoder.feed_forward(model, layer, width)


def _window(model: ConvertedModel) -> None:
    settings = model.settings
    model.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
    usual = _PERIODS[model.architecture]
    period = settings.count("sliding_window_pattern", "_sliding_window_pattern", default=usual, maximum=MAX_LAYERS)
    windowed = decoder.windowed_layers(model, period)
    if windowed != [(layer + 1) % usual != 0 for layer in range(model.layers)]:
        model.key("attention.sliding_window_pattern", np.array(windowed, np.bool_))


def _caps(model: ConvertedModel) -> None:
    settings = model.settings
    scores, final = "attn_logit_softcapping", "final_logit_softcapping"
    if model.architecture == "gemma2":
        for name, default in ((scores, 50.0), (final, 30.0)):
            if settings.values.get(name, default) is None:
                raise settings.error(name, "null is not supported by gemma2")
            model.key(name, settings.real(name, default=default, minimum=1e-3, maximum=MAX_CAP))
        return
    if settings.has(scores):
        raise settings.error(scores, "gemma3 does not cap attention scores")
    if settings.has(final):
        model.key(final, settings.real(final, minimum=1e-3, maximum=MAX_CAP))


def _check_scale(model: ConvertedModel) -> None:
    """Raises ModelFileError for an unusual attention scale, since GGUF readers infer the scale from the layer count."""
    settings, name = model.settings, "query_pre_attn_scalar"
    whole = model.layers == _LAYERS_27B[model.architecture]
    wanted = model.width // model.heads if whole else model.head_width
    if settings.has(name) and settings.real(name) != wanted:
        raise settings.error(name, f"expected {wanted} for {model.layers} layers, found {settings.shown(name)}")


def _norms(model: ConvertedModel, place: str, source: str) -> None:
    _norm(model, f"{place}.attn_norm", f"{source}.input_layernorm", model.width)
    if model.architecture == "gemma":
        _norm(model, f"{place}.ffn_norm", f"{source}.post_attention_layernorm", model.width)
        return
    _norm(model, f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", model.width)
    _norm(model, f"{place}.ffn_norm", f"{source}.pre_feedforward_layernorm", model.width)
    _norm(model, f"{place}.post_ffw_norm", f"{source}.post_feedforward_layernorm", model.width)
    if model.architecture == "gemma3":
        for part in ("q", "k"):
            _norm(model, f"{place}.attn_{part}_norm", f"{source}.self_attn.{part}_norm", model.head_width)


def _norm(model: ConvertedModel, name: str, source: str, width: int) -> None:
    model.put(f"{name}.weight", mapped(model.take(f"{source}.weight", width), _plus_one))


def _plus_one(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values + _ONE
