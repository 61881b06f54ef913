"""Falcon-H1. Each layer has attention parallel to Mamba 2. The model's multipliers are included in GGUF's weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.converters.recurrent.mamba import Mamba, mamba_keys, read_mamba, write_mamba
from llamaclust.tools.convert.lazy import Lazy, scaled
from llamaclust.tools.convert.rotation import rotation

_MAX_FACTOR = 1e6


def build(model: ConvertedModel) -> None:
    settings, width = model.settings, decoder.feed_forward_width(model)
    decoder.refuse(model, "mamba_proj_bias", "projectors_bias", "attention_bias", "mlp_bias")
    has_norm = settings.flag("mamba_rms_norm")
    if has_norm and settings.flag("mamba_norm_before_gate", default=True):
        raise settings.error("mamba_norm_before_gate", "true is not supported by falcon-h1: its norm is after the gate")
    usual = settings.count("mamba_expand", default=2) * model.width
    mamba = read_mamba(model, settings.count("mamba_d_ssm", default=usual))
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model)
    rotation(model, model.head_width, says_dimensions=False)
    mamba_keys(model, mamba)
    model.copy("output_norm", "model.final_layernorm", model.width)
    _ends(model)
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        model.copy(f"{place}.attn_norm", f"{source}.input_layernorm", model.width)
        # llama.cpp's name of this norm has no suffix `.weight`.
        model.put(f"{place}.ffn_norm", model.take(f"{source}.pre_ff_layernorm.weight", model.width))
        decoder.attention(model, layer)
        write_mamba(model, place, f"{source}.mamba", mamba, has_norm=has_norm)
        decoder.feed_forward(model, layer, width, source="feed_forward")
    _multiply(model, mamba)


def _ends(model: ConvertedModel) -> None:
    embedding = model.take("model.embed_tokens.weight", model.words, model.width)
    head = embedding
    if not model.settings.flag("tie_word_embeddings"):
        head = model.take("lm_head.weight", model.words, model.width)
    model.put("token_embd.weight", _times(embedding, _factor(model, "embedding_multiplier")))
    model.put("output.weight", _times(head, _factor(model, "lm_head_multiplier")))


def _multiply(model: ConvertedModel, mamba: Mamba) -> None:
    into = _factor(model, "attention_in_multiplier")
    gate, down = _factors(model, "mlp_multipliers", 2)
    factors = {
        "attn_q": into,
        "attn_k": into * _factor(model, "key_multiplier"),
        "attn_v": into,
        "attn_output": _factor(model, "attention_out_multiplier"),
        "ssm_out": _factor(model, "ssm_out_multiplier"),
        "ffn_gate": gate,
        "ffn_down": down,
    }
    products = _product_factors(model, mamba)
    for layer in range(model.layers):
        for name, factor in factors.items():
            key = f"blk.{layer}.{name}.weight"
            model.tensors[key] = _times(model.tensors[key], factor)
        key = f"blk.{layer}.ssm_in.weight"
        model.tensors[key] = scaled(model.tensors[key], products)


def _product_factors(model: ConvertedModel, mamba: Mamba) -> NDArray[np.float32]:
    """Returns a factor for each row of `ssm_in`. The rows compute Mamba's gate, x, B, C and dt, in this order."""
    parts = (mamba.inner, mamba.inner, mamba.matrices, mamba.matrices, mamba.heads)
    factors = _factors(model, "ssm_multipliers", len(parts))
    return np.repeat(np.array(factors, np.float32) * np.float32(_factor(model, "ssm_in_multiplier")), parts)


def _factor(model: ConvertedModel, name: str) -> float:
    return model.settings.real(name, default=1.0, minimum=1e-9, maximum=_MAX_FACTOR)


def _factors(model: ConvertedModel, name: str, count: int) -> list[float]:
    return model.settings.reals(name, count) if model.settings.has(name) else [1.0] * count


def _times(tensor: Lazy, factor: float) -> Lazy:
    return tensor if factor == 1 else scaled(tensor, np.full(tensor.shape[0], factor, np.float32))
