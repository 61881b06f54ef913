"""Qwen3-Next and Qwen 3.5. Most layers have a gated delta net. The others have gated attention. All norms except the
delta net's multiply by the stored weight plus one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.steps.states import MAX_HEADS, MAX_KEY_CHANNELS, MAX_TAPS, VALUE_CHANNELS
from llamaclust.tools.convert.converted_model import ConvertedModel, picked
from llamaclust.tools.convert.converters import decoder, experts
from llamaclust.tools.convert.lazy import columns_of, decay, gathered, joined, mapped, squeezed
from llamaclust.tools.convert.rotation import rotating_channels, rotation, sections
from llamaclust.tools.convert.settings import MAX_LAYERS

_PERIOD = 4
_SHARE = 0.25
_KINDS = ("linear_attention", "full_attention")
_ONE = np.float32(1)
_PREDICTION = (
    ("nextn.enorm", "pre_fc_norm_embedding"),
    ("nextn.hnorm", "pre_fc_norm_hidden"),
    ("nextn.shared_head_norm", "norm"),
)


@dataclass(frozen=True, slots=True)
class _DeltaNet:
    """Sizes of a delta net. If `tiled`, value head j belongs to key head j % key_heads in the GGUF file."""

    key_heads: int
    heads: int
    width: int
    taps: int
    tiled: bool

    @property
    def keys(self) -> int:
        return self.key_heads * self.width

    @property
    def values(self) -> int:
        return self.heads * self.width

    @property
    def channels(self) -> int:
        return 2 * self.keys + self.values

    def order(self, width: int) -> NDArray[np.int64]:
        """Returns, for each row of the value heads in GGUF, its index in the checkpoint. A head has `width` rows."""
        numbers = np.arange(self.heads * width, dtype=np.int64)
        if not self.tiled:
            return numbers
        return numbers.reshape(self.key_heads, -1, width).swapaxes(0, 1).reshape(-1)


def build(model: ConvertedModel) -> None:
    net = _read_net(model)
    has_experts = model.architecture != "qwen35"
    further = _further_layers(model)
    recurrent = _recurrent(model)
    _keys(model, net, recurrent, further, has_experts)
    model.copy("token_embd", "model.embed_tokens", model.words, model.width)
    _norm(model, "output_norm", "model.norm", model.width)
    model.output()
    for layer in range(model.layers):
        _layer(model, f"blk.{layer}", f"model.layers.{layer}", net if recurrent[layer] else None, has_experts)
    for number in range(further):
        _layer(model, f"blk.{model.layers + number}", f"mtp.layers.{number}", None, has_experts)
    if further:
        place = f"blk.{model.layers}"
        model.copy(f"{place}.nextn.eh_proj", "mtp.fc", model.width, 2 * model.width)
        for name, source in _PREDICTION:
            _norm(model, f"{place}.{name}", f"mtp.{source}", model.width)


def _read_net(model: ConvertedModel) -> _DeltaNet:
    settings = model.settings
    heads = settings.count("linear_num_value_heads", maximum=MAX_HEADS)
    key_heads = settings.count("linear_num_key_heads", maximum=heads)
    width = settings.count("linear_key_head_dim", maximum=MAX_KEY_CHANNELS)
    if width % VALUE_CHANNELS:
        raise settings.error("linear_key_head_dim", f"expected a multiple of {VALUE_CHANNELS}, found {width}")
    if heads % key_heads:
        raise settings.error("linear_num_key_heads", f"{key_heads} does not divide {heads} value heads")
    if settings.count("linear_value_head_dim", maximum=MAX_KEY_CHANNELS) != width:
        value = settings.values["linear_value_head_dim"]
        raise settings.error("linear_value_head_dim", f"expected {width}, the width of keys, found {value}")
    taps = settings.count("linear_conv_kernel_dim", default=4, minimum=2, maximum=MAX_TAPS)
    return _DeltaNet(key_heads, heads, width, taps, model.architecture != "qwen3next")


def _recurrent(model: ConvertedModel) -> list[bool]:
    settings = model.settings
    listed = settings.values.get("layer_types")
    if not isinstance(listed, list):
        period = settings.count("full_attention_interval", default=_PERIOD, maximum=MAX_LAYERS)
        return [(layer + 1) % period != 0 for layer in range(model.layers)]
    if len(listed) != model.layers or not all(kind in _KINDS for kind in listed):
        what = f"expected {model.layers} entries, each {' or '.join(_KINDS)}"
        raise settings.error("layer_types", f"{what}, found {len(listed)}: {settings.shown('layer_types')}")
    return [kind == _KINDS[0] for kind in listed]


def _further_layers(model: ConvertedModel) -> int:
    if not model.has("mtp.fc.weight"):
        return 0
    # The configuration of Qwen3-Next does not state its one MTP layer.
    return model.settings.count("mtp_num_hidden_layers", default=1, maximum=MAX_LAYERS)


def _keys(model: ConvertedModel, net: _DeltaNet, recurrent: list[bool], further: int, has_experts: bool) -> None:
    settings = model.settings
    decoder.activation(model, decoder.SILU, "hidden_act")
    inner = settings.count("moe_intermediate_size") if has_experts else None
    decoder.usual_keys(model, settings.count("intermediate_size", default=inner))
    decoder.rms_epsilon(model, default=1e-6)
    dimensions = rotating_channels(model, _SHARE)
    rotation(model, dimensions)
    if model.architecture != "qwen3next":
        model.key("rope.dimension_sections", np.array(sections(model.settings, dimensions // 2), np.int32))
    model.key("ssm.conv_kernel", net.taps)
    model.key("ssm.state_size", net.width)
    model.key("ssm.group_count", net.key_heads)
    model.key("ssm.time_step_rank", net.heads)
    model.key("ssm.inner_size", net.values)
    model.key("attention.recurrent_layers", np.array([*recurrent, *[False] * further], np.bool_))
    model.key("full_attention_interval", settings.count("full_attention_interval", default=_PERIOD, maximum=MAX_LAYERS))
    if further:
        model.key("block_count", model.layers + further)
        model.key("nextn_predict_layers", further)
    if has_experts:
        _expert_keys(model)


def _expert_keys(model: ConvertedModel) -> None:
    settings = model.settings
    if settings.count("decoder_sparse_step", default=1) != 1 or settings.values.get("mlp_only_layers"):
        raise settings.error("mlp_only_layers", "layers without experts among layers with experts are not supported")
    if not settings.flag("norm_topk_prob", default=True):
        raise settings.error("norm_topk_prob", f"false is not supported by {model.architecture}")
    count = settings.count("num_experts", maximum=experts.MAX_EXPERTS)
    experts.expert_keys(
        model, count, settings.count("num_experts_per_tok", maximum=count), settings.count("moe_intermediate_size")
    )
    model.key("expert_shared_feed_forward_length", settings.count("shared_expert_intermediate_size"))


def _layer(model: ConvertedModel, place: str, source: str, net: _DeltaNet | None, has_experts: bool) -> None:
    _norm(model, f"{place}.attn_norm", f"{source}.input_layernorm", model.width)
    _norm(model, f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", model.width)
    if net is None:
        _attention(model, place, f"{source}.self_attn")
    else:
        _delta_net(model, place, f"{source}.linear_attn", net)
    if has_experts:
        _experts(model, place, f"{source}.mlp")
    else:
        _feed_forward(model, place, f"{source}.mlp", model.settings.count("intermediate_size"))


def _attention(model: ConvertedModel, place: str, source: str) -> None:
    query, key = model.heads * model.head_width, model.kv_heads * model.head_width
    for part, rows in (("q", 2 * query), ("k", key), ("v", key)):
        model.copy(f"{place}.attn_{part}", f"{source}.{part}_proj", rows, model.width, bias=None)
    model.copy(f"{place}.attn_output", f"{source}.o_proj", model.width, query, bias=None)
    for part in ("q", "k"):
        _norm(model, f"{place}.attn_{part}_norm", f"{source}.{part}_norm", model.head_width)


def _delta_net(model: ConvertedModel, place: str, source: str, net: _DeltaNet) -> None:
    convolution = model.take(f"{source}.conv1d.weight", net.channels, 1, net.taps)
    keys = np.arange(2 * net.keys, dtype=np.int64)
    channels = np.concatenate([keys, 2 * net.keys + net.order(net.width)])
    model.put(f"{place}.ssm_conv1d.weight", gathered(joined(convolution), channels))
    if model.architecture == "qwen3next":
        _grouped_products(model, place, source, net)
    else:
        mixed = model.take(f"{source}.in_proj_qkv.weight", net.channels, model.width)
        model.put(f"{place}.attn_qkv.weight", gathered(mixed, channels))
        for name, module, width in (("attn_gate", "z", net.width), ("ssm_beta", "b", 1), ("ssm_alpha", "a", 1)):
            found = model.take(f"{source}.in_proj_{module}.weight", net.heads * width, model.width)
            model.put(f"{place}.{name}.weight", gathered(found, net.order(width)))
    logarithms = model.take(f"{source}.A_log", net.heads)
    model.put(f"{place}.ssm_a", gathered(decay(logarithms), net.order(1)))
    model.put(f"{place}.ssm_dt.bias", gathered(model.take(f"{source}.dt_bias", net.heads), net.order(1)))
    model.copy(f"{place}.ssm_norm", f"{source}.norm", net.width)
    out = model.take(f"{source}.out_proj.weight", model.width, net.values)
    model.put(f"{place}.ssm_out.weight", columns_of(out, net.order(net.width)) if net.tiled else out)


def _grouped_products(model: ConvertedModel, place: str, source: str, net: _DeltaNet) -> None:
    """Splits the matrix that computes q, k, v and gates into `attn_qkv` and `attn_gate`."""
    shared = net.values // net.key_heads
    group = 2 * net.width + 2 * shared
    whole = model.take(f"{source}.in_proj_qkvz.weight", net.key_heads * group, model.width)
    starts = range(0, net.key_heads * group, group)
    at, parts = 0, []
    for rows in (net.width, net.width, shared, shared):
        parts.append([range(start + at, start + at + rows) for start in starts])
        at += rows
    model.put(f"{place}.attn_qkv.weight", picked(whole, [*parts[0], *parts[1], *parts[2]]))
    model.put(f"{place}.attn_gate.weight", picked(whole, parts[3]))
    model.copy(f"{place}.ssm_ba", f"{source}.in_proj_ba", 2 * net.heads, model.width)


def _feed_forward(model: ConvertedModel, place: str, source: str, width: int, suffix: str = "") -> None:
    for part in ("gate", "up"):
        model.copy(f"{place}.ffn_{part}{suffix}", f"{source}.{part}_proj", width, model.width)
    model.copy(f"{place}.ffn_down{suffix}", f"{source}.down_proj", model.width, width)


def _experts(model: ConvertedModel, place: str, source: str) -> None:
    settings, hidden = model.settings, model.width
    count, width = settings.count("num_experts", maximum=experts.MAX_EXPERTS), settings.count("moe_intermediate_size")
    model.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, hidden)
    experts.matrices(model, place, f"{source}.experts", count, width)
    shared = settings.count("shared_expert_intermediate_size")
    _feed_forward(model, place, f"{source}.shared_expert", shared, "_shexp")
    gate = model.take(f"{source}.shared_expert_gate.weight", 1, hidden)
    model.put(f"{place}.ffn_gate_inp_shexp.weight", squeezed(gate))


def _norm(model: ConvertedModel, name: str, source: str, width: int) -> None:
    model.put(f"{name}.weight", mapped(model.take(f"{source}.weight", width), lambda values: values + _ONE))
