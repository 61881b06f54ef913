"""Qwen3-Next and Qwen 3.5. Most layers have a gated delta net. The others have gated attention. All norms except the
delta net's multiply by the stored weight plus one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.steps.states import MAX_HEADS, MAX_KEY_CHANNELS, MAX_TAPS, VALUE_CHANNELS
from llamaclust.tools.convert.lazy import columns_of, decay, gathered, joined, mapped, squeezed
from llamaclust.tools.convert.page import Page, picked
from llamaclust.tools.convert.pages import decoder, experts
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
        """Returns the checkpoint's row for each row of the value heads in GGUF. A value head has `width` rows."""
        numbers = np.arange(self.heads * width, dtype=np.int64)
        if not self.tiled:
            return numbers
        return numbers.reshape(self.key_heads, -1, width).swapaxes(0, 1).reshape(-1)


def build(page: Page) -> None:
    net = _read_net(page)
    has_experts = page.architecture != "qwen35"
    further = _further_layers(page)
    recurrent = _recurrent(page)
    _keys(page, net, recurrent, further, has_experts)
    page.copy("token_embd", "model.embed_tokens", page.words, page.width)
    _norm(page, "output_norm", "model.norm", page.width)
    page.output()
    for layer in range(page.layers):
        _layer(page, f"blk.{layer}", f"model.layers.{layer}", net if recurrent[layer] else None, has_experts)
    for number in range(further):
        _layer(page, f"blk.{page.layers + number}", f"mtp.layers.{number}", None, has_experts)
    if further:
        place = f"blk.{page.layers}"
        page.copy(f"{place}.nextn.eh_proj", "mtp.fc", page.width, 2 * page.width)
        for name, source in _PREDICTION:
            _norm(page, f"{place}.{name}", f"mtp.{source}", page.width)


def _read_net(page: Page) -> _DeltaNet:
    settings = page.settings
    heads = settings.count("linear_num_value_heads", maximum=MAX_HEADS)
    key_heads = settings.count("linear_num_key_heads", maximum=heads)
    width = settings.count("linear_key_head_dim", maximum=MAX_KEY_CHANNELS)
    if width % VALUE_CHANNELS:
        raise settings.error("linear_key_head_dim", f"expected a multiple of {VALUE_CHANNELS}, found {width}")
    if heads % key_heads:
        raise settings.error("linear_num_key_heads", f"{key_heads} does not divide {heads} heads of values")
    if settings.count("linear_value_head_dim", maximum=MAX_KEY_CHANNELS) != width:
        value = settings.values["linear_value_head_dim"]
        raise settings.error("linear_value_head_dim", f"expected {width} as for keys, found {value}")
    taps = settings.count("linear_conv_kernel_dim", default=4, minimum=2, maximum=MAX_TAPS)
    return _DeltaNet(key_heads, heads, width, taps, page.architecture != "qwen3next")


def _recurrent(page: Page) -> list[bool]:
    settings = page.settings
    listed = settings.values.get("layer_types")
    if not isinstance(listed, list):
        period = settings.count("full_attention_interval", default=_PERIOD, maximum=MAX_LAYERS)
        return [(layer + 1) % period != 0 for layer in range(page.layers)]
    if len(listed) != page.layers or not all(kind in _KINDS for kind in listed):
        raise settings.error(
            "layer_types", f"expected {page.layers} of {', '.join(_KINDS)}, found {len(listed)} entries"
        )
    return [kind == _KINDS[0] for kind in listed]


def _further_layers(page: Page) -> int:
    if not page.has("mtp.fc.weight"):
        return 0
    # The configuration of Qwen3-Next does not state its one MTP layer.
    return page.settings.count("mtp_num_hidden_layers", default=1, maximum=MAX_LAYERS)


def _keys(page: Page, net: _DeltaNet, recurrent: list[bool], further: int, has_experts: bool) -> None:
    settings = page.settings
    decoder.activation(page, decoder.SILU, "hidden_act")
    inner = settings.count("moe_intermediate_size") if has_experts else None
    decoder.usual_keys(page, settings.count("intermediate_size", default=inner))
    decoder.rms_epsilon(page, default=1e-6)
    dimensions = rotating_channels(page, _SHARE)
    rotation(page, dimensions)
    if page.architecture != "qwen3next":
        page.key("rope.dimension_sections", np.array(sections(page.settings, dimensions // 2), np.int32))
    page.key("ssm.conv_kernel", net.taps)
    page.key("ssm.state_size", net.width)
    page.key("ssm.group_count", net.key_heads)
    page.key("ssm.time_step_rank", net.heads)
    page.key("ssm.inner_size", net.values)
    page.key("attention.recurrent_layers", np.array([*recurrent, *[False] * further], np.bool_))
    page.key("full_attention_interval", settings.count("full_attention_interval", default=_PERIOD, maximum=MAX_LAYERS))
    if further:
        page.key("block_count", page.layers + further)
        page.key("nextn_predict_layers", further)
    if has_experts:
        _expert_keys(page)


def _expert_keys(page: Page) -> None:
    settings = page.settings
    if settings.count("decoder_sparse_step", default=1) != 1 or settings.values.get("mlp_only_layers"):
        raise settings.error("mlp_only_layers", "layers without experts among layers with experts are not supported")
    if not settings.flag("norm_topk_prob", default=True):
        raise settings.error("norm_topk_prob", f"false is not supported by {page.architecture}")
    count = settings.count("num_experts", maximum=experts.MAX_EXPERTS)
    experts.expert_keys(
        page, count, settings.count("num_experts_per_tok", maximum=count), settings.count("moe_intermediate_size")
    )
    page.key("expert_shared_feed_forward_length", settings.count("shared_expert_intermediate_size"))


def _layer(page: Page, place: str, source: str, net: _DeltaNet | None, has_experts: bool) -> None:
    _norm(page, f"{place}.attn_norm", f"{source}.input_layernorm", page.width)
    _norm(page, f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", page.width)
    if net is None:
        _attention(page, place, f"{source}.self_attn")
    else:
        _delta_net(page, place, f"{source}.linear_attn", net)
    if has_experts:
        _experts(page, place, f"{source}.mlp")
    else:
        _feed_forward(page, place, f"{source}.mlp", page.settings.count("intermediate_size"))


def _attention(page: Page, place: str, source: str) -> None:
    query, key = page.heads * page.head_width, page.kv_heads * page.head_width
    for part, rows in (("q", 2 * query), ("k", key), ("v", key)):
        page.copy(f"{place}.attn_{part}", f"{source}.{part}_proj", rows, page.width, bias=None)
    page.copy(f"{place}.attn_output", f"{source}.o_proj", page.width, query, bias=None)
    for part in ("q", "k"):
        _norm(page, f"{place}.attn_{part}_norm", f"{source}.{part}_norm", page.head_width)


def _delta_net(page: Page, place: str, source: str, net: _DeltaNet) -> None:
    convolution = page.take(f"{source}.conv1d.weight", net.channels, 1, net.taps)
    keys = np.arange(2 * net.keys, dtype=np.int64)
    channels = np.concatenate([keys, 2 * net.keys + net.order(net.width)])
    page.put(f"{place}.ssm_conv1d.weight", gathered(joined(convolution), channels))
    if page.architecture == "qwen3next":
        _grouped_products(page, place, source, net)
    else:
        mixed = page.take(f"{source}.in_proj_qkv.weight", net.channels, page.width)
        page.put(f"{place}.attn_qkv.weight", gathered(mixed, channels))
        for name, module, width in (("attn_gate", "z", net.width), ("ssm_beta", "b", 1), ("ssm_alpha", "a", 1)):
            found = page.take(f"{source}.in_proj_{module}.weight", net.heads * width, page.width)
            page.put(f"{place}.{name}.weight", gathered(found, net.order(width)))
    logarithms = page.take(f"{source}.A_log", net.heads)
    page.put(f"{place}.ssm_a", gathered(decay(logarithms), net.order(1)))
    page.put(f"{place}.ssm_dt.bias", gathered(page.take(f"{source}.dt_bias", net.heads), net.order(1)))
    page.copy(f"{place}.ssm_norm", f"{source}.norm", net.width)
    out = page.take(f"{source}.out_proj.weight", page.width, net.values)
    page.put(f"{place}.ssm_out.weight", columns_of(out, net.order(net.width)) if net.tiled else out)


def _grouped_products(page: Page, place: str, source: str, net: _DeltaNet) -> None:
    """Splits the matrix that computes q, k, v and gates into `attn_qkv` and `attn_gate`."""
    shared = net.values // net.key_heads
    group = 2 * net.width + 2 * shared
    whole = page.take(f"{source}.in_proj_qkvz.weight", net.key_heads * group, page.width)
    starts = range(0, net.key_heads * group, group)
    at, parts = 0, []
    for rows in (net.width, net.width, shared, shared):
        parts.append([range(start + at, start + at + rows) for start in starts])
        at += rows
    page.put(f"{place}.attn_qkv.weight", picked(whole, [*parts[0], *parts[1], *parts[2]]))
    page.put(f"{place}.attn_gate.weight", picked(whole, parts[3]))
    page.copy(f"{place}.ssm_ba", f"{source}.in_proj_ba", 2 * net.heads, page.width)


def _feed_forward(page: Page, place: str, source: str, width: int, suffix: str = "") -> None:
    for part in ("gate", "up"):
        page.copy(f"{place}.ffn_{part}{suffix}", f"{source}.{part}_proj", width, page.width)
    page.copy(f"{place}.ffn_down{suffix}", f"{source}.down_proj", page.width, width)


def _experts(page: Page, place: str, source: str) -> None:
    settings, hidden = page.settings, page.width
    count, width = settings.count("num_experts", maximum=experts.MAX_EXPERTS), settings.count("moe_intermediate_size")
    page.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, hidden)
    experts.matrices(page, place, f"{source}.experts", count, width)
    shared = settings.count("shared_expert_intermediate_size")
    _feed_forward(page, place, f"{source}.shared_expert", shared, "_shexp")
    gate = page.take(f"{source}.shared_expert_gate.weight", 1, hidden)
    page.put(f"{place}.ffn_gate_inp_shexp.weight", squeezed(gate))


def _norm(page: Page, name: str, source: str, width: int) -> None:
    page.put(f"{name}.weight", mapped(page.take(f"{source}.weight", width), lambda values: values + _ONE))
