"""Gemma, Gemma 2 and Gemma 3. Their norms multiply by the stored weight plus one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.tools.convert.lazy import mapped
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import local_base, rotation
from llamaclust.tools.convert.settings import MAX_CAP, MAX_CONTEXT, MAX_LAYERS

_ONE = np.float32(1)
_PERIODS = {"gemma2": 2, "gemma3": 6}
_LAYERS_27B = {"gemma2": 46, "gemma3": 62}


def build(page: Page) -> None:
    width, settings = page.settings.count("intermediate_size"), page.settings
    decoder.activation(page, decoder.GELU, "hidden_activation", "hidden_act")
    decoder.usual_keys(page, width)
    page.key("attention.key_length", page.head_width)
    page.key("attention.value_length", page.head_width)
    decoder.rms_epsilon(page, default=1e-6)
    if page.architecture == "gemma3":
        rotation(page, page.head_width, base=1e6, says_dimensions=False)
        page.key("rope.freq_base_swa", local_base(settings))
    else:
        rotation(page, page.head_width, says_dimensions=False)
    if settings.flag("use_bidirectional_attention"):
        raise settings.error("use_bidirectional_attention", "true is not supported")
    if page.architecture != "gemma":
        _window(page)
        _caps(page)
        _check_scale(page)
    page.output(tied=True)
    page.copy("token_embd", "model.embed_tokens", page.words, page.width)
    _norm(page, "output_norm", "model.norm", page.width)
    for layer in range(page.layers):
        _norms(page, f"blk.{layer}", f"model.layers.{layer}")
        decoder.attention(page, layer)
        decoder.feed_forward(page, layer, width)


def _window(page: Page) -> None:
    settings = page.settings
    page.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
    usual = _PERIODS[page.architecture]
    period = settings.count("sliding_window_pattern", "_sliding_window_pattern", default=usual, maximum=MAX_LAYERS)
    windowed = decoder.windowed_layers(page, period)
    if windowed != [(layer + 1) % usual != 0 for layer in range(page.layers)]:
        page.key("attention.sliding_window_pattern", np.array(windowed, np.bool_))


def _caps(page: Page) -> None:
    settings = page.settings
    scores, final = "attn_logit_softcapping", "final_logit_softcapping"
    if page.architecture == "gemma2":
        for name, default in ((scores, 50.0), (final, 30.0)):
            if settings.values.get(name, default) is None:
                raise settings.error(name, "null is not supported by gemma2")
            page.key(name, settings.real(name, default=default, minimum=1e-3, maximum=MAX_CAP))
        return
    if settings.has(scores):
        raise settings.error(scores, "gemma3 does not cap scores")
    if settings.has(final):
        page.key(final, settings.real(final, minimum=1e-3, maximum=MAX_CAP))


def _check_scale(page: Page) -> None:
    """Raises ModelFileError for an unusual attention scale, since GGUF readers infer the scale from the layer count."""
    settings, name = page.settings, "query_pre_attn_scalar"
    whole = page.layers == _LAYERS_27B[page.architecture]
    wanted = page.width // page.heads if whole else page.head_width
    if settings.has(name) and settings.real(name) != wanted:
        raise settings.error(name, f"expected {wanted} for {page.layers} layers, found {settings.shown(name)}")


def _norms(page: Page, place: str, source: str) -> None:
    _norm(page, f"{place}.attn_norm", f"{source}.input_layernorm", page.width)
    if page.architecture == "gemma":
        _norm(page, f"{place}.ffn_norm", f"{source}.post_attention_layernorm", page.width)
        return
    _norm(page, f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", page.width)
    _norm(page, f"{place}.ffn_norm", f"{source}.pre_feedforward_layernorm", page.width)
    _norm(page, f"{place}.post_ffw_norm", f"{source}.post_feedforward_layernorm", page.width)
    if page.architecture == "gemma3":
        for part in ("q", "k"):
            _norm(page, f"{place}.attn_{part}_norm", f"{source}.self_attn.{part}_norm", page.head_width)


def _norm(page: Page, name: str, source: str, width: int) -> None:
    page.put(f"{name}.weight", mapped(page.take(f"{source}.weight", width), _plus_one))


def _plus_one(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values + _ONE
