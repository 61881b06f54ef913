"""GLM 4.5, 4.6 and Air. The layers for multi-token prediction come last."""

from __future__ import annotations

from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder, experts
from llamaclust.tools.convert.rotation import rotating_channels, rotation
from llamaclust.tools.convert.settings import MAX_LAYERS


def build(page: Page) -> None:
    settings, width = page.settings, decoder.feed_forward_width(page)
    if settings.count("n_group", default=1) != 1:
        raise settings.error(
            "n_group", f"{settings.shown('n_group')} is not supported; supported is one group of experts"
        )
    decoder.usual_keys(page, width)
    decoder.rms_epsilon(page, default=1e-5)
    rotation(page, rotating_channels(page, 0.5))
    further = experts.further_layers(page)
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
            experts.prediction(page, layer)


def _expert_keys(page: Page) -> None:
    settings = page.settings
    count = settings.count("n_routed_experts", maximum=experts.MAX_EXPERTS)
    experts.expert_keys(
        page, count, settings.count("num_experts_per_tok", maximum=count), settings.count("moe_intermediate_size")
    )
    page.key("expert_shared_count", settings.count("n_shared_experts", default=1, maximum=experts.MAX_EXPERTS))
    experts.weight_keys(page, experts.SIGMOID, normalized=True)


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
    count, width = (
        settings.count("n_routed_experts", maximum=experts.MAX_EXPERTS),
        settings.count("moe_intermediate_size"),
    )
    page.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, page.width)
    page.put(f"{place}.exp_probs_b.bias", page.take(f"{source}.gate.e_score_correction_bias", count))
    experts.matrices(page, place, f"{source}.experts", count, width)
    shared = width * settings.count("n_shared_experts", default=1, maximum=experts.MAX_EXPERTS)
    decoder.feed_forward(page, layer, shared, source="mlp.shared_experts", suffix="_shexp")
