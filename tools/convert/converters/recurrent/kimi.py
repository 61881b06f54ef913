"""Kimi Linear. A layer has a delta net with a decay for each channel, or latent attention without RoPE."""

from __future__ import annotations

from typing import Any

import numpy as np

from llamaclust.model.checkpoints.settings import Settings
from llamaclust.model.gguf.values import shown
from llamaclust.model.steps.states import MAX_KEY_CHANNELS, MAX_TAPS, VALUE_CHANNELS
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder, experts
from llamaclust.tools.convert.converters.latent.attention import Latent, latent_attention, latent_keys, read_latent
from llamaclust.tools.convert.lazy import decay, reshaped

_EXPERT_MATRICES = ("w1", "w3", "w2")
_MIXTURE = "block_sparse_moe"
_KINDS = ("linear_attention", "full_attention")
_PRODUCTS = (("ssm_f_a", "f_a_proj"), ("ssm_g_a", "g_a_proj"), ("ssm_f_b", "f_b_proj"), ("ssm_g_b", "g_b_proj"))


def build(model: ConvertedModel) -> None:
    settings, width, latent = model.settings, decoder.feed_forward_width(model), read_latent(model)
    net, dense, attends = _net(model), experts.leading_dense(model), _attends(model)
    if not settings.flag("mla_use_nope", default=True):
        raise settings.error("mla_use_nope", "false is not supported by kimi-linear")
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model, default=1e-5)
    _keys(model, latent, attends, dense)
    model.key("kda.head_dim", net.count("head_dim"))
    model.key("ssm.conv_kernel", net.count("short_conv_kernel_size"))
    decoder.ends(model)
    for layer in range(model.layers):
        decoder.norms(model, layer)
        if attends[layer]:
            latent_attention(model, layer, latent)
        else:
            _delta_net(model, layer, net.count("head_dim"), net.count("short_conv_kernel_size"))
        if layer < dense:
            decoder.feed_forward(model, layer, width, source=_dense_module(model, layer))
        else:
            _experts(model, layer)


def _dense_module(model: ConvertedModel, layer: int) -> str:
    return _MIXTURE if model.has(f"model.layers.{layer}.{_MIXTURE}.gate_proj.weight") else "mlp"


def _net(model: ConvertedModel) -> Settings:
    settings = model.settings
    linear = settings.inner("linear_attn_config")
    if not settings.has("linear_attn_config"):
        names = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"}
        names["short_conv_kernel_size"] = "linear_conv_kernel_dim"
        linear = Settings({name: settings.values.get(other) for name, other in names.items()}, settings.origin)
    if linear.count("num_heads") != model.heads:
        raise linear.error("num_heads", f"expected {model.heads} as in attention, found {linear.shown('num_heads')}")
    if linear.count("head_dim", maximum=MAX_KEY_CHANNELS) % VALUE_CHANNELS:
        raise linear.error("head_dim", f"expected a multiple of {VALUE_CHANNELS}, found {linear.shown('head_dim')}")
    linear.count("short_conv_kernel_size", minimum=2, maximum=MAX_TAPS)
    return linear


def _attends(model: ConvertedModel) -> list[bool]:
    """Returns, for each layer, True if the layer has attention. The setting `full_attn_layers` counts layers from 1."""
    settings = model.settings
    listed: Any = settings.inner("linear_attn_config").values.get("full_attn_layers")
    if isinstance(listed, list):
        attends = decoder.numbered_layers(model, "full_attn_layers", listed, first=1)
        return [layer + 1 in attends for layer in range(model.layers)]
    kinds = settings.values.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != model.layers or not all(kind in _KINDS for kind in kinds):
        raise settings.error("layer_types", f"expected {' or '.join(_KINDS)} for {model.layers} layers")
    return [kind == _KINDS[1] for kind in kinds]


def _keys(model: ConvertedModel, latent: Latent, attends: list[bool], dense: int) -> None:
    settings = model.settings
    latent_keys(model, latent)
    model.key("attention.head_count_kv", np.array(attends, np.int32))
    model.key("rope.dimension_count", latent.rotated)
    model.key("leading_dense_block_count", dense)
    function = settings.text("moe_router_activation_func", default="sigmoid")
    if function != "sigmoid":
        raise settings.error("moe_router_activation_func", f"expected sigmoid, found {shown(function)}")
    count, width, shared = _sizes(model)
    used = settings.count("num_experts_per_token", "num_experts_per_tok", maximum=count)
    experts.expert_keys(model, count, used, width)
    model.key("expert_shared_count", shared)
    experts.weight_keys(model, experts.SIGMOID, normalized=True)
    experts.group_keys(model, count, used)


def _sizes(model: ConvertedModel) -> tuple[int, int, int]:
    settings = model.settings
    count = settings.count("num_experts", "num_local_experts", maximum=experts.MAX_EXPERTS)
    shared = settings.count("num_shared_experts", "n_shared_experts", default=1, maximum=experts.MAX_EXPERTS)
    return count, settings.count("moe_intermediate_size"), shared


def _delta_net(model: ConvertedModel, layer: int, head: int, taps: int) -> None:
    place, source, heads = f"blk.{layer}", f"model.layers.{layer}.self_attn", model.heads
    inner = heads * head
    for part in "qkv":
        model.copy(f"{place}.attn_{part}", f"{source}.{part}_proj", inner, model.width)
        model.copy(f"{place}.ssm_conv1d_{part}", f"{source}.{part}_conv1d", inner, 1, taps)
    for name, module in _PRODUCTS:
        rows, columns = (head, model.width) if name.endswith("_a") else (inner, head)
        model.copy(f"{place}.{name}", f"{source}.{module}", rows, columns)
    model.copy(f"{place}.ssm_beta", f"{source}.b_proj", heads, model.width)
    model.put(f"{place}.ssm_a", decay(reshaped(model.take(f"{source}.A_log", 1, 1, heads, 1), (heads, 1))))
    model.put(f"{place}.ssm_dt.bias", model.take(f"{source}.dt_bias", inner))
    model.copy(f"{place}.ssm_norm", f"{source}.o_norm", head)
    model.copy(f"{place}.attn_output", f"{source}.o_proj", model.width, inner)


def _experts(model: ConvertedModel, layer: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}.{_MIXTURE}"
    count, width, shared = _sizes(model)
    model.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, model.width)
    model.put(f"{place}.exp_probs_b.bias", model.take(f"{source}.gate.e_score_correction_bias", count))
    experts.matrices(model, place, f"{source}.experts", count, width, _EXPERT_MATRICES)
    decoder.feed_forward(model, layer, shared * width, source=f"{_MIXTURE}.shared_experts", suffix="_shexp")
