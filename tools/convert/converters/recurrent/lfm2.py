"""LFM2, dense and MoE. Most layers have short convolutions, and the others have attention."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from llamaclust.model.steps.states import MAX_TAPS
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder, experts
from llamaclust.tools.convert.lazy import joined
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_LAYERS

_KINDS = MappingProxyType({"conv": "conv", "full_attention": "attention"})
_BASE = 1e6
_PARTS = ("w1", "w3", "w2")


def build(model: ConvertedModel) -> None:
    has_experts, hidden = model.architecture == "lfm2moe", model.width
    kinds = _kinds(model)
    width = model.settings.count("intermediate_size") if has_experts else _adjusted_width(model)
    _keys(model, width, kinds)
    dense = _expert_keys(model) if has_experts else model.layers
    model.copy("token_embd", "model.embed_tokens", model.words, hidden)
    model.copy("token_embd_norm", "model.embedding_norm", hidden)
    model.output(tied=model.settings.flag("tie_embedding", default=True))
    for layer, kind in enumerate(kinds):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        model.copy(f"{place}.attn_norm", f"{source}.operator_norm", hidden)
        model.copy(f"{place}.ffn_norm", f"{source}.ffn_norm", hidden)
        if kind == "conv":
            _convolution(model, place, f"{source}.conv")
        else:
            _attention(model, place, f"{source}.self_attn")
        if layer < dense:
            _feed_forward(model, place, f"{source}.feed_forward", width)
        else:
            _experts(model, place, f"{source}.feed_forward")


def _kinds(model: ConvertedModel) -> list[str]:
    listed = model.settings.values.get("full_attn_idxs")
    if model.settings.has("layer_types") or not isinstance(listed, list):
        return decoder.layer_kinds(model, "layer_types", _KINDS)
    attends = decoder.numbered_layers(model, "full_attn_idxs", listed)
    return ["attention" if layer in attends else "conv" for layer in range(model.layers)]


def _adjusted_width(model: ConvertedModel) -> int:
    """Returns the width of the feed-forward network, adjusted if `block_auto_adjust_ff_dim` is set."""
    settings = model.settings
    width = settings.count("block_ff_dim", "intermediate_size")
    if not settings.flag("block_auto_adjust_ff_dim", default=True):
        return width
    factor = settings.real("block_ffn_dim_multiplier", default=1.0, minimum=1e-3, maximum=1e3)
    multiple = settings.count("block_multiple_of", default=256)
    return multiple * -(-int(factor * int(2 * width / 3)) // multiple)


def _keys(model: ConvertedModel, width: int, kinds: list[str]) -> None:
    decoder.refuse(model, "conv_bias")
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    model.key("attention.head_count_kv", np.array([model.kv_heads * (kind != "conv") for kind in kinds], np.int32))
    model.key("shortconv.l_cache", _taps(model))
    decoder.rms_epsilon(model, "norm_eps", default=1e-5)
    rotation(model, model.head_width, base=_BASE, says_dimensions=False)


def _taps(model: ConvertedModel) -> int:
    return model.settings.count("conv_L_cache", default=3, minimum=2, maximum=MAX_TAPS)


def _expert_keys(model: ConvertedModel) -> int:
    settings = model.settings
    for name in ("use_expert_bias", "norm_topk_prob"):
        if not settings.flag(name, default=True):
            raise settings.error(name, "false is not supported by lfm2moe")
    if settings.real("routed_scaling_factor", default=1.0) != 1:
        raise settings.error("routed_scaling_factor", "lfm2moe supports only 1")
    dense = settings.count("num_dense_layers", default=2, minimum=0, maximum=MAX_LAYERS)
    count = settings.count("num_experts", maximum=experts.MAX_EXPERTS)
    used = settings.count("num_experts_per_tok", maximum=count)
    experts.expert_keys(model, count, used, settings.count("moe_intermediate_size"))
    model.key("leading_dense_block_count", dense)
    model.key("expert_gating_func", experts.SIGMOID)
    return dense


def _convolution(model: ConvertedModel, place: str, source: str) -> None:
    hidden = model.width
    model.copy(f"{place}.shortconv.in_proj", f"{source}.in_proj", 3 * hidden, hidden)
    model.copy(f"{place}.shortconv.out_proj", f"{source}.out_proj", hidden, hidden)
    model.put(f"{place}.shortconv.conv.weight", joined(model.take(f"{source}.conv.weight", hidden, 1, _taps(model))))


def _attention(model: ConvertedModel, place: str, source: str) -> None:
    query, key = model.heads * model.head_width, model.kv_heads * model.head_width
    for part, rows in (("q", query), ("k", key), ("v", key)):
        model.copy(f"{place}.attn_{part}", f"{source}.{part}_proj", rows, model.width)
    model.copy(f"{place}.attn_output", f"{source}.out_proj", model.width, query)
    for part in ("q", "k"):
        model.copy(f"{place}.attn_{part}_norm", f"{source}.{part}_layernorm", model.head_width)


def _feed_forward(model: ConvertedModel, place: str, source: str, width: int) -> None:
    for part, module in (("gate", "w1"), ("up", "w3")):
        model.copy(f"{place}.ffn_{part}", f"{source}.{module}", width, model.width)
    model.copy(f"{place}.ffn_down", f"{source}.w2", model.width, width)


def _experts(model: ConvertedModel, place: str, source: str) -> None:
    settings = model.settings
    count = settings.count("num_experts", maximum=experts.MAX_EXPERTS)
    model.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, model.width)
    model.put(f"{place}.exp_probs_b.bias", model.take(f"{source}.expert_bias", count))
    decoder.experts(model, place, count, settings.count("moe_intermediate_size"), _PARTS, f"{source}.experts")
