"""Hunyuan, dense and MoE. Q and K are normed after RoPE. RoPE's base grows with the setting `alpha`."""

from __future__ import annotations

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder, experts
from llamaclust.tools.convert.rotation import alpha_rotation, rotation


def build_dense(model: ConvertedModel) -> None:
    width = decoder.feed_forward_width(model)
    _keys(model, width)
    for layer in range(model.layers):
        _attention(model, layer)
        decoder.feed_forward(model, layer, width)


def build_moe(model: ConvertedModel) -> None:
    """Converts Hunyuan A13B, which has experts and a shared expert."""
    settings, width = model.settings, decoder.feed_forward_width(model)
    count = _of_all_layers(model, "num_experts", maximum=experts.MAX_EXPERTS)
    inner = _of_all_layers(model, "moe_intermediate_size", default=width)
    shared = width * _of_all_layers(model, "num_shared_expert", default=1, maximum=experts.MAX_EXPERTS)
    if not settings.flag("norm_topk_prob", default=True):
        raise settings.error("norm_topk_prob", "false is not supported by hunyuan-moe")
    _keys(model, width)
    experts.expert_keys(model, count, _of_all_layers(model, "moe_topk", "num_experts_per_tok", maximum=count), inner)
    model.key("expert_shared_feed_forward_length", shared)
    model.key("expert_shared_count", shared // width)
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}.mlp"
        _attention(model, layer)
        model.copy(f"{place}.ffn_gate_inp", f"{source}.gate.wg", count, model.width)
        experts.matrices(model, place, f"{source}.experts", count, inner)
        decoder.feed_forward(model, layer, shared, source="mlp.shared_mlp", suffix="_shexp")


def _keys(model: ConvertedModel, width: int) -> None:
    for name, wanted in (("use_qk_norm", True), ("use_cla", False)):
        if model.settings.flag(name, default=wanted) is not wanted:
            raise model.settings.error(name, f"{str(not wanted).lower()} is not supported by {model.architecture}")
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model, default=1e-5)
    if not alpha_rotation(model, model.head_width):
        rotation(model, model.head_width)
    decoder.ends(model)


def _attention(model: ConvertedModel, layer: int) -> None:
    decoder.norms(model, layer)
    decoder.attention(model, layer)
    for part, module in (("q", "query"), ("k", "key")):
        source = f"model.layers.{layer}.self_attn.{module}_layernorm"
        model.copy(f"blk.{layer}.attn_{part}_norm", source, model.head_width)


def _of_all_layers(model: ConvertedModel, *names: str, default: int | None = None, maximum: int = 1 << 20) -> int:
    settings = model.settings
    name = next((name for name in names if settings.has(name)), names[0])
    listed = settings.values.get(name)
    if not isinstance(listed, list):
        return settings.count(name, default=default, maximum=maximum)
    if len(listed) != model.layers or any(number != listed[0] for number in listed):
        raise settings.error(name, f"expected {model.layers} equal numbers, found {settings.shown(name)}")
    return type(settings)({name: listed[0]}, settings.origin).count(name, maximum=maximum)
