"""Hunyuan, dense and MoE. Q and K are normed after RoPE. RoPE's base grows with the setting `alpha`."""

from __future__ import annotations

from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder, experts
from llamaclust.tools.convert.rotation import alpha_rotation, rotation


def build_dense(page: Page) -> None:
    width = decoder.feed_forward_width(page)
    _keys(page, width)
    for layer in range(page.layers):
        _attention(page, layer)
        decoder.feed_forward(page, layer, width)


def build_moe(page: Page) -> None:
    """Converts Hunyuan A13B, which has experts and a shared expert."""
    settings, width = page.settings, decoder.feed_forward_width(page)
    count = _of_all_layers(page, "num_experts", maximum=experts.MAX_EXPERTS)
    inner = _of_all_layers(page, "moe_intermediate_size", default=width)
    shared = width * _of_all_layers(page, "num_shared_expert", default=1, maximum=experts.MAX_EXPERTS)
    if not settings.flag("norm_topk_prob", default=True):
        raise settings.error("norm_topk_prob", "false is not supported by hunyuan-moe")
    _keys(page, width)
    experts.expert_keys(page, count, _of_all_layers(page, "moe_topk", "num_experts_per_tok", maximum=count), inner)
    page.key("expert_shared_feed_forward_length", shared)
    page.key("expert_shared_count", shared // width)
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}.mlp"
        _attention(page, layer)
        page.copy(f"{place}.ffn_gate_inp", f"{source}.gate.wg", count, page.width)
        experts.matrices(page, place, f"{source}.experts", count, inner)
        decoder.feed_forward(page, layer, shared, source="mlp.shared_mlp", suffix="_shexp")


def _keys(page: Page, width: int) -> None:
    for name, wanted in (("use_qk_norm", True), ("use_cla", False)):
        if page.settings.flag(name, default=wanted) is not wanted:
            raise page.settings.error(name, f"{str(not wanted).lower()} is not supported by {page.architecture}")
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page, default=1e-5)
    if not alpha_rotation(page, page.head_width):
        rotation(page, page.head_width)
    decoder.ends(page)


def _attention(page: Page, layer: int) -> None:
    decoder.norms(page, layer)
    decoder.attention(page, layer)
    for part, module in (("q", "query"), ("k", "key")):
        source = f"model.layers.{layer}.self_attn.{module}_layernorm"
        page.copy(f"blk.{layer}.attn_{part}_norm", source, page.head_width)


def _of_all_layers(page: Page, *names: str, default: int | None = None, maximum: int = 1 << 20) -> int:
    settings = page.settings
    name = next((name for name in names if settings.has(name)), names[0])
    listed = settings.values.get(name)
    if not isinstance(listed, list):
        return settings.count(name, default=default, maximum=maximum)
    if len(listed) != page.layers or any(number != listed[0] for number in listed):
        raise settings.error(name, f"expected {page.layers} equal numbers, found {len(listed)}")
    return type(settings)({name: listed[0]}, settings.origin).count(name, maximum=maximum)
