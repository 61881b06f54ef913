"""Kimi Linear. A layer has a delta net with a decay for each channel, or latent attention without RoPE."""

from __future__ import annotations

from typing import Any

import numpy as np

from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.values import shown
from llamaclust.model.steps.states import MAX_KEY_CHANNELS, MAX_TAPS, VALUE_CHANNELS
from llamaclust.tools.convert.lazy import decay, reshaped
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder, experts
from llamaclust.tools.convert.pages.latent.attention import Latent, latent_attention, latent_keys, read_latent

_EXPERT_MATRICES = ("w1", "w3", "w2")
_MIXTURE = "block_sparse_moe"
_KINDS = ("linear_attention", "full_attention")
_PRODUCTS = (("ssm_f_a", "f_a_proj"), ("ssm_g_a", "g_a_proj"), ("ssm_f_b", "f_b_proj"), ("ssm_g_b", "g_b_proj"))


def build(page: Page) -> None:
    settings, width, latent = page.settings, decoder.feed_forward_width(page), read_latent(page)
    net, dense, attends = _net(page), experts.leading_dense(page), _attends(page)
    if not settings.flag("mla_use_nope", default=True):
        raise settings.error("mla_use_nope", "false is not supported by kimi-linear")
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page, default=1e-5)
    _keys(page, latent, attends, dense)
    page.key("kda.head_dim", net.count("head_dim"))
    page.key("ssm.conv_kernel", net.count("short_conv_kernel_size"))
    decoder.ends(page)
    for layer in range(page.layers):
        decoder.norms(page, layer)
        if attends[layer]:
            latent_attention(page, layer, latent)
        else:
            _delta_net(page, layer, net.count("head_dim"), net.count("short_conv_kernel_size"))
        if layer < dense:
            decoder.feed_forward(page, layer, width, source=_dense_module(page, layer))
        else:
            _experts(page, layer)


def _dense_module(page: Page, layer: int) -> str:
    return _MIXTURE if page.has(f"model.layers.{layer}.{_MIXTURE}.gate_proj.weight") else "mlp"


def _net(page: Page) -> Settings:
    settings = page.settings
    linear = settings.inner("linear_attn_config")
    if not settings.has("linear_attn_config"):
        names = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"}
        names["short_conv_kernel_size"] = "linear_conv_kernel_dim"
        linear = Settings({name: settings.values.get(other) for name, other in names.items()}, settings.origin)
    if linear.count("num_heads") != page.heads:
        raise linear.error("num_heads", f"expected {page.heads} as in attention, found {linear.shown('num_heads')}")
    if linear.count("head_dim", maximum=MAX_KEY_CHANNELS) % VALUE_CHANNELS:
        raise linear.error("head_dim", f"expected a multiple of {VALUE_CHANNELS}, found {linear.shown('head_dim')}")
    linear.count("short_conv_kernel_size", minimum=2, maximum=MAX_TAPS)
    return linear


def _attends(page: Page) -> list[bool]:
    """Returns, for each layer, True if the layer has attention. The setting `full_attn_layers` counts layers from 1."""
    settings = page.settings
    listed: Any = settings.inner("linear_attn_config").values.get("full_attn_layers")
    if isinstance(listed, list):
        attends = decoder.numbered_layers(page, "full_attn_layers", listed, first=1)
        return [layer + 1 in attends for layer in range(page.layers)]
    kinds = settings.values.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != page.layers or not all(kind in _KINDS for kind in kinds):
        raise settings.error("layer_types", f"expected {page.layers} of {', '.join(_KINDS)}")
    return [kind == _KINDS[1] for kind in kinds]


def _keys(page: Page, latent: Latent, attends: list[bool], dense: int) -> None:
    settings = page.settings
    latent_keys(page, latent)
    page.key("attention.head_count_kv", np.array(attends, np.int32))
    page.key("rope.dimension_count", latent.rotated)
    page.key("leading_dense_block_count", dense)
    function = settings.text("moe_router_activation_func", default="sigmoid")
    if function != "sigmoid":
        raise settings.error("moe_router_activation_func", f"expected sigmoid, found {shown(function)}")
    count, width, shared = _sizes(page)
    used = settings.count("num_experts_per_token", "num_experts_per_tok", maximum=count)
    experts.expert_keys(page, count, used, width)
    page.key("expert_shared_count", shared)
    experts.weight_keys(page, experts.SIGMOID, normalized=True)
    experts.group_keys(page, count, used)


def _sizes(page: Page) -> tuple[int, int, int]:
    settings = page.settings
    count = settings.count("num_experts", "num_local_experts", maximum=experts.MAX_EXPERTS)
    shared = settings.count("num_shared_experts", "n_shared_experts", default=1, maximum=experts.MAX_EXPERTS)
    return count, settings.count("moe_intermediate_size"), shared


def _delta_net(page: Page, layer: int, head: int, taps: int) -> None:
    place, source, heads = f"blk.{layer}", f"model.layers.{layer}.self_attn", page.heads
    inner = heads * head
    for part in "qkv":
        page.copy(f"{place}.attn_{part}", f"{source}.{part}_proj", inner, page.width)
        page.copy(f"{place}.ssm_conv1d_{part}", f"{source}.{part}_conv1d", inner, 1, taps)
    for name, module in _PRODUCTS:
        rows, columns = (head, page.width) if name.endswith("_a") else (inner, head)
        page.copy(f"{place}.{name}", f"{source}.{module}", rows, columns)
    page.copy(f"{place}.ssm_beta", f"{source}.b_proj", heads, page.width)
    page.put(f"{place}.ssm_a", decay(reshaped(page.take(f"{source}.A_log", 1, 1, heads, 1), (heads, 1))))
    page.put(f"{place}.ssm_dt.bias", page.take(f"{source}.dt_bias", inner))
    page.copy(f"{place}.ssm_norm", f"{source}.o_norm", head)
    page.copy(f"{place}.attn_output", f"{source}.o_proj", page.width, inner)


def _experts(page: Page, layer: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}.{_MIXTURE}"
    count, width, shared = _sizes(page)
    page.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, page.width)
    page.put(f"{place}.exp_probs_b.bias", page.take(f"{source}.gate.e_score_correction_bias", count))
    experts.matrices(page, place, f"{source}.experts", count, width, _EXPERT_MATRICES)
    decoder.feed_forward(page, layer, shared * width, source=f"{_MIXTURE}.shared_experts", suffix="_shexp")
