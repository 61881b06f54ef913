"""glm4moe: GLM 4.5, 4.6 and Air, whose layers that predict further tokens stand behind the others."""

from __future__ import annotations

from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotating_channels, rotation
from llamaclust.tools.convert.settings import MAX_LAYERS

_PARTS = ("gate_proj", "up_proj", "down_proj")
_MAX_EXPERTS = 1 << 10
_SIGMOID = 2  # GGUF's number


def build(page: Page) -> None:
    """Leading dense layers, then experts beside a shared one; layers that predict further tokens if the checkpoint
    has them."""
    settings, width = page.settings, decoder.feed_forward_width(page)
    if settings.count("n_group", default=1) != 1:
        raise settings.error("n_group", f"{settings.values['n_group']}, only one group of experts is supported")
    decoder.usual_keys(page, width)
    decoder.rms_epsilon(page, default=1e-5)
    rotation(page, rotating_channels(page, 0.5))
    further = _further_layers(page)
    if further:
        page.key("block_count", page.layers + further)
        page.key("nextn_predict_layers", further)
    dense = settings.count("first_k_dense_replace", default=1, minimum=0, maximum=MAX_LAYERS)
    page.key("leading_dense_block_count", dense)
    _expert_keys(page)
    decoder.ends(page)
    for layer in range(page.layers + further):
        _moe_attention(page, layer)
        if layer < dense:
            decoder.feed_forward(page, layer, width)
        else:
            _experts(page, layer)
        if layer >= page.layers:
            _prediction(page, layer)


def _expert_keys(page: Page) -> None:
    settings = page.settings
    count = settings.count("n_routed_experts", maximum=_MAX_EXPERTS)
    page.key("expert_count", count)
    page.key("expert_used_count", settings.count("num_experts_per_tok", maximum=count))
    page.key("expert_feed_forward_length", settings.count("moe_intermediate_size"))
    page.key("expert_shared_count", settings.count("n_shared_experts", default=1, maximum=_MAX_EXPERTS))
    page.key("expert_gating_func", _SIGMOID)
    page.key("expert_weights_scale", settings.real("routed_scaling_factor", default=1.0, minimum=1e-6, maximum=1e6))
    page.key("expert_weights_norm", settings.flag("norm_topk_prob", default=True))


def _moe_attention(page: Page, layer: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    page.copy(f"{place}.attn_norm", f"{source}.input_layernorm", page.width)
    page.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", page.width)
    decoder.attention(page, layer)
    if page.settings.flag("use_qk_norm"):
        for part in ("q", "k"):
            page.copy(f"{place}.attn_{part}_norm", f"{source}.self_attn.{part}_norm", page.head_width)


def _experts(page: Page, layer: int) -> None:
    settings, place, source = page.settings, f"blk.{layer}", f"model.layers.{layer}.mlp"
    count, width = settings.count("n_routed_experts", maximum=_MAX_EXPERTS), settings.count("moe_intermediate_size")
    page.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, page.width)
    page.put(f"{place}.exp_probs_b.bias", page.take(f"{source}.gate.e_score_correction_bias", count))
    decoder.experts(page, place, count, width, _PARTS, f"{source}.experts")
    shared = width * settings.count("n_shared_experts", default=1, maximum=_MAX_EXPERTS)
    decoder.feed_forward(page, layer, shared, source="mlp.shared_experts", suffix="_shexp")


def _further_layers(page: Page) -> int:
    """Layers that predict further tokens: all that the configuration names, or none."""
    count = page.settings.count("num_nextn_predict_layers", default=0, minimum=0, maximum=MAX_LAYERS)
    return count if count and page.has(f"model.layers.{page.layers}.eh_proj.weight") else 0


def _prediction(page: Page, layer: int) -> None:
    """What such a layer has beside an ordinary one; embedding and head are those of the model in some checkpoints."""
    place, source, hidden = f"blk.{layer}.nextn", f"model.layers.{layer}", page.width
    page.copy(f"{place}.eh_proj", f"{source}.eh_proj", hidden, 2 * hidden)
    page.copy(f"{place}.enorm", f"{source}.enorm", hidden)
    page.copy(f"{place}.hnorm", f"{source}.hnorm", hidden)
    page.copy(f"{place}.shared_head_norm", f"{source}.shared_head.norm", hidden)
    for name, module in (("embed_tokens", "embed_tokens"), ("shared_head_head", "shared_head.head")):
        if page.has(f"{source}.{module}.weight"):
            page.copy(f"{place}.{name}", f"{source}.{module}", page.words, hidden)
