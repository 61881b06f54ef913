"""gemma, gemma2, gemma3: their norms multiply by one more than what is stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.tools.convert.lazy import mapped
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT

_ONE = np.float32(1)


def build(page: Page) -> None:
    width, settings = decoder.feed_forward_width(page), page.settings
    page.usual_keys(width)
    page.key("attention.key_length", page.head_width)
    page.key("attention.value_length", page.head_width)
    page.rms_epsilon(default=1e-6)
    if page.architecture == "gemma3":
        rotation(page, page.head_width, base=1e6, says_dimensions=False)
        local = settings.real("rope_local_base_freq", default=10000.0, minimum=1.0)
        page.key("rope.freq_base_swa", local)
    if page.architecture != "gemma":
        _window_and_caps(page)
    page.drop("lm_head.weight")
    page.copy("token_embd", "model.embed_tokens", page.words, page.width)
    _norm(page, "output_norm", "model.norm", page.width)
    for layer in range(page.layers):
        _norms(page, f"blk.{layer}", f"model.layers.{layer}")
        decoder.attention(page, layer)
        decoder.feed_forward(page, layer, width)


def _window_and_caps(page: Page) -> None:
    settings = page.settings
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    defaults = (50.0, 30.0) if page.architecture == "gemma2" else (None, None)
    for name, default in zip(caps, defaults, strict=True):
        if settings.has(name) or default:
            page.key(name, settings.real(name, default=default, minimum=1e-3))
    page.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))


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
