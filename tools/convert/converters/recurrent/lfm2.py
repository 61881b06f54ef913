"""LFM2, dense and MoE. Most layers have short convolutions, and the others have attention."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from llamaclust.model.steps.states import MAX_TAPS
from llamaclust.tools.convert.lazy import joined
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder, experts
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_LAYERS

_KINDS = MappingProxyType({"conv": "conv", "full_attention": "attention"})
_BASE = 1e6
_PARTS = ("w1", "w3", "w2")


def build(page: Page) -> None:
    has_experts, hidden = page.architecture == "lfm2moe", page.width
    kinds = _kinds(page)
    width = page.settings.count("intermediate_size") if has_experts else _adjusted_width(page)
    _keys(page, width, kinds)
    dense = _expert_keys(page) if has_experts else page.layers
    page.copy("token_embd", "model.embed_tokens", page.words, hidden)
    page.copy("token_embd_norm", "model.embedding_norm", hidden)
    page.output(tied=page.settings.flag("tie_embedding", default=True))
    for layer, kind in enumerate(kinds):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        page.copy(f"{place}.attn_norm", f"{source}.operator_norm", hidden)
        page.copy(f"{place}.ffn_norm", f"{source}.ffn_norm", hidden)
        if kind == "conv":
            _convolution(page, place, f"{source}.conv")
        else:
            _attention(page, place, f"{source}.self_attn")
        if layer < dense:
            _feed_forward(page, place, f"{source}.feed_forward", width)
        else:
            _experts(page, place, f"{source}.feed_forward")


def _kinds(page: Page) -> list[str]:
    listed = page.settings.values.get("full_attn_idxs")
    if page.settings.has("layer_types") or not isinstance(listed, list):
        return decoder.layer_kinds(page, "layer_types", _KINDS)
    attends = decoder.numbered_layers(page, "full_attn_idxs", listed)
    return ["attention" if layer in attends else "conv" for layer in range(page.layers)]


def _adjusted_width(page: Page) -> int:
    """Returns the width of the feed-forward network, adjusted if `block_auto_adjust_ff_dim` is set."""
    settings = page.settings
    width = settings.count("block_ff_dim", "intermediate_size")
    if not settings.flag("block_auto_adjust_ff_dim", default=True):
        return width
    factor = settings.real("block_ffn_dim_multiplier", default=1.0, minimum=1e-3, maximum=1e3)
    multiple = settings.count("block_multiple_of", default=256)
    return multiple * -(-int(factor * int(2 * width / 3)) // multiple)


def _keys(page: Page, width: int, kinds: list[str]) -> None:
    decoder.refuse(page, "conv_bias")
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    page.key("attention.head_count_kv", np.array([page.kv_heads * (kind != "conv") for kind in kinds], np.int32))
    page.key("shortconv.l_cache", _taps(page))
    decoder.rms_epsilon(page, "norm_eps", default=1e-5)
    rotation(page, page.head_width, base=_BASE, says_dimensions=False)


def _taps(page: Page) -> int:
    return page.settings.count("conv_L_cache", default=3, minimum=2, maximum=MAX_TAPS)


def _expert_keys(page: Page) -> int:
    settings = page.settings
    for name in ("use_expert_bias", "norm_topk_prob"):
        if not settings.flag(name, default=True):
            raise settings.error(name, "false is not supported by lfm2moe")
    if settings.real("routed_scaling_factor", default=1.0) != 1:
        raise settings.error("routed_scaling_factor", "lfm2moe supports only 1")
    dense = settings.count("num_dense_layers", default=2, minimum=0, maximum=MAX_LAYERS)
    count = settings.count("num_experts", maximum=experts.MAX_EXPERTS)
    used = settings.count("num_experts_per_tok", maximum=count)
    experts.expert_keys(page, count, used, settings.count("moe_intermediate_size"))
    page.key("leading_dense_block_count", dense)
    page.key("expert_gating_func", experts.SIGMOID)
    return dense


def _convolution(page: Page, place: str, source: str) -> None:
    hidden = page.width
    page.copy(f"{place}.shortconv.in_proj", f"{source}.in_proj", 3 * hidden, hidden)
    page.copy(f"{place}.shortconv.out_proj", f"{source}.out_proj", hidden, hidden)
    page.put(f"{place}.shortconv.conv.weight", joined(page.take(f"{source}.conv.weight", hidden, 1, _taps(page))))


def _attention(page: Page, place: str, source: str) -> None:
    query, key = page.heads * page.head_width, page.kv_heads * page.head_width
    for part, rows in (("q", query), ("k", key), ("v", key)):
        page.copy(f"{place}.attn_{part}", f"{source}.{part}_proj", rows, page.width)
    page.copy(f"{place}.attn_output", f"{source}.out_proj", page.width, query)
    for part in ("q", "k"):
        page.copy(f"{place}.attn_{part}_norm", f"{source}.{part}_layernorm", page.head_width)


def _feed_forward(page: Page, place: str, source: str, width: int) -> None:
    for part, module in (("gate", "w1"), ("up", "w3")):
        page.copy(f"{place}.ffn_{part}", f"{source}.{module}", width, page.width)
    page.copy(f"{place}.ffn_down", f"{source}.w2", page.width, width)


def _experts(page: Page, place: str, source: str) -> None:
    settings = page.settings
    count = settings.count("num_experts", maximum=experts.MAX_EXPERTS)
    page.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, page.width)
    page.put(f"{place}.exp_probs_b.bias", page.take(f"{source}.expert_bias", count))
    decoder.experts(page, place, count, settings.count("moe_intermediate_size"), _PARTS, f"{source}.experts")
