"""Falcon-H1. Each layer has attention parallel to Mamba 2. The model's multipliers are included in GGUF's weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.tools.convert.lazy import Lazy, scaled
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.pages.recurrent.mamba import Mamba, mamba_keys, read_mamba, write_mamba
from llamaclust.tools.convert.rotation import rotation

_MAX_FACTOR = 1e6


def build(page: Page) -> None:
    settings, width = page.settings, decoder.feed_forward_width(page)
    decoder.refuse(page, "mamba_proj_bias", "projectors_bias", "attention_bias", "mlp_bias")
    has_norm = settings.flag("mamba_rms_norm")
    if has_norm and settings.flag("mamba_norm_before_gate", default=True):
        raise settings.error("mamba_norm_before_gate", "true is not supported by falcon-h1: its norm is after the gate")
    usual = settings.count("mamba_expand", default=2) * page.width
    mamba = read_mamba(page, settings.count("mamba_d_ssm", default=usual))
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page)
    rotation(page, page.head_width, says_dimensions=False)
    mamba_keys(page, mamba)
    page.copy("output_norm", "model.final_layernorm", page.width)
    _ends(page)
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        page.copy(f"{place}.attn_norm", f"{source}.input_layernorm", page.width)
        # llama.cpp's name of this norm has no suffix `.weight`.
        page.put(f"{place}.ffn_norm", page.take(f"{source}.pre_ff_layernorm.weight", page.width))
        decoder.attention(page, layer)
        write_mamba(page, place, f"{source}.mamba", mamba, has_norm=has_norm)
        decoder.feed_forward(page, layer, width, source="feed_forward")
    _multiply(page, mamba)


def _ends(page: Page) -> None:
    """Copies embedding and output matrix, each with its own multiplier."""
    embedding = page.take("model.embed_tokens.weight", page.words, page.width)
    head = embedding
    if not page.settings.flag("tie_word_embeddings"):
        head = page.take("lm_head.weight", page.words, page.width)
    page.put("token_embd.weight", _times(embedding, _factor(page, "embedding_multiplier")))
    page.put("output.weight", _times(head, _factor(page, "lm_head_multiplier")))


def _multiply(page: Page, mamba: Mamba) -> None:
    into = _factor(page, "attention_in_multiplier")
    gate, down = _factors(page, "mlp_multipliers", 2)
    factors = {
        "attn_q": into,
        "attn_k": into * _factor(page, "key_multiplier"),
        "attn_v": into,
        "attn_output": _factor(page, "attention_out_multiplier"),
        "ssm_out": _factor(page, "ssm_out_multiplier"),
        "ffn_gate": gate,
        "ffn_down": down,
    }
    products = _product_factors(page, mamba)
    for layer in range(page.layers):
        for name, factor in factors.items():
            key = f"blk.{layer}.{name}.weight"
            page.tensors[key] = _times(page.tensors[key], factor)
        key = f"blk.{layer}.ssm_in.weight"
        page.tensors[key] = scaled(page.tensors[key], products)


def _product_factors(page: Page, mamba: Mamba) -> NDArray[np.float32]:
    """Returns a factor for each row of `ssm_in`. The rows compute Mamba's gate, x, B, C and dt, in this order."""
    parts = (mamba.inner, mamba.inner, mamba.matrices, mamba.matrices, mamba.heads)
    factors = _factors(page, "ssm_multipliers", len(parts))
    return np.repeat(np.array(factors, np.float32) * np.float32(_factor(page, "ssm_in_multiplier")), parts)


def _factor(page: Page, name: str) -> float:
    return page.settings.real(name, default=1.0, minimum=1e-9, maximum=_MAX_FACTOR)


def _factors(page: Page, name: str, count: int) -> list[float]:
    return page.settings.reals(name, count) if page.settings.has(name) else [1.0] * count


def _times(tensor: Lazy, factor: float) -> Lazy:
    return tensor if factor == 1 else scaled(tensor, np.full(tensor.shape[0], factor, np.float32))
