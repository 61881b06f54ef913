"""Mixtures of experts beside what other pages have: granitemoe, ernie4_5-moe."""

from __future__ import annotations

from llamaclust.tools.convert.lazy import part_of_each, rows, squeezed
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.pages.dense import granite_scales
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_LAYERS

_MAX_EXPERTS = 1 << 10
_PARTS = ("gate_proj", "up_proj", "down_proj")
_PREDICTIONS = ("model.mtp_block.", "model.mtp_emb_norm.", "model.mtp_hidden_norm.", "model.mtp_linear_proj.")


def build_granite(page: Page) -> None:
    """Granite 3 with experts, and with a shared one. Gate and up are one matrix, one half below the other."""
    settings, hidden = page.settings, page.width
    width = decoder.feed_forward_width(page)
    count = settings.count("num_local_experts", maximum=_MAX_EXPERTS)
    shared = settings.count("shared_intermediate_size", default=0, minimum=0)
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page)
    granite_scales(page)
    rotation(page, page.head_width)
    page.key("expert_count", count)
    page.key("expert_used_count", settings.count("num_experts_per_tok", maximum=count))
    if shared:
        page.key("expert_shared_feed_forward_length", shared)
    decoder.ends(page)
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        decoder.norms(page, layer)
        decoder.attention(page, layer)
        experts = f"{source}.block_sparse_moe"
        page.copy(f"{place}.ffn_gate_inp", f"{experts}.router.layer", count, hidden)
        both = page.take(f"{experts}.input_linear.weight", count, 2 * width, hidden)
        page.put(f"{place}.ffn_gate_exps.weight", part_of_each(both, 0, width))
        page.put(f"{place}.ffn_up_exps.weight", part_of_each(both, width, 2 * width))
        page.copy(f"{place}.ffn_down_exps", f"{experts}.output_linear", count, hidden, width)
        if shared:
            whole = page.take(f"{source}.shared_mlp.input_linear.weight", 2 * shared, hidden)
            page.put(f"{place}.ffn_gate_shexp.weight", rows(whole, 0, shared))
            page.put(f"{place}.ffn_up_shexp.weight", rows(whole, shared, 2 * shared))
            page.copy(f"{place}.ffn_down_shexp", f"{source}.shared_mlp.output_linear", hidden, shared)


def build_ernie(page: Page) -> None:
    """ERNIE 4.5 with experts, from a layer on in each or every few, beside shared ones in one network. Layers that
    predict further tokens are left out, as by llama.cpp."""
    settings, width = page.settings, decoder.feed_forward_width(page)
    if settings.flag("use_bias"):
        raise settings.error("use_bias", "true is not what ernie4_5-moe computes")
    first = settings.count("moe_layer_start_index", minimum=0, maximum=MAX_LAYERS)
    step = settings.count("moe_layer_interval", default=1, maximum=MAX_LAYERS)
    last = settings.count("moe_layer_end_index", default=page.layers - 1, minimum=0, maximum=MAX_LAYERS)
    if last < page.layers - 1:
        raise settings.error("moe_layer_end_index", f"{last}, only {page.layers - 1}, the last layer, is supported")
    decoder.usual_keys(page, width)
    decoder.rms_epsilon(page)
    rotation(page, page.head_width, base=500000.0)
    page.key("leading_dense_block_count", first)
    page.key("interleave_moe_layer_step", step)
    _ernie_keys(page)
    decoder.ends(page)
    for layer in range(page.layers):
        decoder.norms(page, layer)
        decoder.attention(page, layer)
        if layer >= first and (layer + 1) % step == 0:
            _ernie_experts(page, layer)
        else:
            decoder.feed_forward(page, layer, width)
    if page.leave(*_PREDICTIONS):
        page.notes.append("layers that predict further tokens are not written")


def _ernie_keys(page: Page) -> None:
    settings = page.settings
    count = settings.count("moe_num_experts", maximum=_MAX_EXPERTS)
    page.key("expert_count", count)
    page.key("expert_used_count", settings.count("moe_k", maximum=count))
    page.key("expert_feed_forward_length", settings.count("moe_intermediate_size"))
    shared = settings.count("moe_num_shared_experts", default=0, minimum=0, maximum=_MAX_EXPERTS)
    page.key("expert_shared_count", shared)
    page.key("expert_shared_feed_forward_length", shared * settings.count("moe_intermediate_size"))


def _ernie_experts(page: Page, layer: int) -> None:
    settings, place, source = page.settings, f"blk.{layer}", f"model.layers.{layer}.mlp"
    count, width = settings.count("moe_num_experts", maximum=_MAX_EXPERTS), settings.count("moe_intermediate_size")
    shared = width * settings.count("moe_num_shared_experts", default=0, minimum=0, maximum=_MAX_EXPERTS)
    page.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, page.width)
    bias = page.take(f"{source}.moe_statics.e_score_correction_bias", 1, count)
    page.put(f"{place}.exp_probs_b.bias", squeezed(bias))
    decoder.experts(page, place, count, width, _PARTS, f"{source}.experts")
    if shared:
        decoder.feed_forward(page, layer, shared, source="mlp.shared_experts", suffix="_shexp")
