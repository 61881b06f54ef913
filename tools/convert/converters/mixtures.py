"""Mixture-of-experts models: granitemoe, ernie4_5-moe, bailingmoe2, minimax-m2."""

from __future__ import annotations

from llamaclust.tools.convert.lazy import part_of_each, rows, squeezed
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder, experts
from llamaclust.tools.convert.pages.dense import granite_scales
from llamaclust.tools.convert.rotation import rotating_channels, rotation
from llamaclust.tools.convert.settings import MAX_LAYERS

_MIXTRAL = ("w1", "w3", "w2")
_PREDICTIONS = ("model.mtp_block.", "model.mtp_emb_norm.", "model.mtp_hidden_norm.", "model.mtp_linear_proj.")


def build_granite(page: Page) -> None:
    settings = page.settings
    width = decoder.feed_forward_width(page)
    shared = settings.count("shared_intermediate_size", default=0, minimum=0)
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page)
    granite_scales(page)
    rotation(page, page.head_width)
    granite_expert_keys(page, shared)
    decoder.ends(page)
    for layer in range(page.layers):
        decoder.norms(page, layer)
        decoder.attention(page, layer)
        granite_experts(page, layer, shared)


def granite_expert_keys(page: Page, shared: int) -> None:
    count = page.settings.count("num_local_experts", maximum=experts.MAX_EXPERTS)
    page.key("expert_count", count)
    page.key("expert_used_count", page.settings.count("num_experts_per_tok", maximum=count))
    if shared:
        page.key("expert_shared_feed_forward_length", shared)


def granite_experts(page: Page, layer: int, shared: int) -> None:
    place, source, hidden = f"blk.{layer}", f"model.layers.{layer}.block_sparse_moe", page.width
    count = page.settings.count("num_local_experts", maximum=experts.MAX_EXPERTS)
    width = decoder.feed_forward_width(page)
    page.copy(f"{place}.ffn_gate_inp", f"{source}.router.layer", count, hidden)
    both = page.take(f"{source}.input_linear.weight", count, 2 * width, hidden)
    page.put(f"{place}.ffn_gate_exps.weight", part_of_each(both, 0, width))
    page.put(f"{place}.ffn_up_exps.weight", part_of_each(both, width, 2 * width))
    page.copy(f"{place}.ffn_down_exps", f"{source}.output_linear", count, hidden, width)
    if shared:
        granite_feed_forward(page, layer, shared, "_shexp")


def granite_feed_forward(page: Page, layer: int, width: int, suffix: str = "") -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}.shared_mlp"
    whole = page.take(f"{source}.input_linear.weight", 2 * width, page.width)
    page.put(f"{place}.ffn_gate{suffix}.weight", rows(whole, 0, width))
    page.put(f"{place}.ffn_up{suffix}.weight", rows(whole, width, 2 * width))
    page.copy(f"{place}.ffn_down{suffix}", f"{source}.output_linear", page.width, width)


def build_ernie(page: Page) -> None:
    """Converts ERNIE 4.5 with experts, without layers for multi-token prediction."""
    settings, width = page.settings, decoder.feed_forward_width(page)
    if settings.flag("use_bias"):
        raise settings.error("use_bias", "true is not supported by ernie4_5-moe")
    first = settings.count("moe_layer_start_index", minimum=0, maximum=MAX_LAYERS)
    step = settings.count("moe_layer_interval", default=1, maximum=MAX_LAYERS)
    last = settings.count("moe_layer_end_index", default=page.layers - 1, minimum=0, maximum=MAX_LAYERS)
    if last < page.layers - 1:
        raise settings.error(
            "moe_layer_end_index", f"{last} is not supported; supported is {page.layers - 1}, the last layer"
        )
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
        page.notes.append(experts.NO_PREDICTIONS)


def _ernie_keys(page: Page) -> None:
    settings = page.settings
    count = settings.count("moe_num_experts", maximum=experts.MAX_EXPERTS)
    experts.expert_keys(page, count, settings.count("moe_k", maximum=count), settings.count("moe_intermediate_size"))
    shared = settings.count("moe_num_shared_experts", default=0, minimum=0, maximum=experts.MAX_EXPERTS)
    page.key("expert_shared_count", shared)
    page.key("expert_shared_feed_forward_length", shared * settings.count("moe_intermediate_size"))


def _ernie_experts(page: Page, layer: int) -> None:
    settings, place, source = page.settings, f"blk.{layer}", f"model.layers.{layer}.mlp"
    count, width = (
        settings.count("moe_num_experts", maximum=experts.MAX_EXPERTS),
        settings.count("moe_intermediate_size"),
    )
    shared = width * settings.count("moe_num_shared_experts", default=0, minimum=0, maximum=experts.MAX_EXPERTS)
    page.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, page.width)
    bias = page.take(f"{source}.moe_statics.e_score_correction_bias", 1, count)
    page.put(f"{place}.exp_probs_b.bias", squeezed(bias))
    experts.matrices(page, place, f"{source}.experts", count, width)
    if shared:
        decoder.feed_forward(page, layer, shared, source="mlp.shared_experts", suffix="_shexp")


def build_bailing(page: Page) -> None:
    """Converts Ling and Ring 2.0, without layers for multi-token prediction."""
    settings, width, hidden = page.settings, decoder.feed_forward_width(page), page.width
    for name, wanted in (("use_bias", False), ("use_qkv_bias", False), ("use_qk_norm", True)):
        if settings.flag(name, default=wanted) is not wanted:
            raise settings.error(name, f"{str(not wanted).lower()} is not supported by bailingmoe2")
    dense = experts.leading_dense(page)
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page, default=1e-6)
    rotation(page, rotating_channels(page, 0.5))
    page.key("leading_dense_block_count", dense)
    _bailing_keys(page)
    page.copy("token_embd", "model.word_embeddings", page.words, hidden)
    page.copy("output_norm", "model.norm", hidden)
    page.output()
    queries, packed = page.heads * page.head_width, (page.heads + 2 * page.kv_heads) * page.head_width
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}.attention"
        decoder.norms(page, layer)
        page.copy(f"{place}.attn_qkv", f"{source}.query_key_value", packed, hidden)
        page.copy(f"{place}.attn_q_norm", f"{source}.query_layernorm", page.head_width)
        page.copy(f"{place}.attn_k_norm", f"{source}.key_layernorm", page.head_width)
        page.copy(f"{place}.attn_output", f"{source}.dense", hidden, queries)
        if layer < dense:
            decoder.feed_forward(page, layer, width)
        else:
            _bailing_experts(page, layer)
    experts.leave_further_layers(page)


def _bailing_sizes(page: Page) -> tuple[int, int, int]:
    settings = page.settings
    shared = settings.count("num_shared_experts", maximum=experts.MAX_EXPERTS)
    return settings.count("num_experts", maximum=experts.MAX_EXPERTS), settings.count("moe_intermediate_size"), shared


def _bailing_keys(page: Page) -> None:
    settings = page.settings
    if settings.text("score_function", default="sigmoid") != "sigmoid":
        raise settings.error(
            "score_function", f"{settings.shown('score_function')} is not supported; supported is sigmoid"
        )
    count, width, shared = _bailing_sizes(page)
    used = settings.count("num_experts_per_tok", maximum=count)
    experts.expert_keys(page, count, used, width)
    page.key("expert_shared_count", shared)
    page.key("expert_shared_feed_forward_length", width)
    experts.weight_keys(page, experts.SIGMOID, normalized=True)
    experts.group_keys(page, count, used)


def _bailing_experts(page: Page, layer: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}.mlp"
    count, width, shared = _bailing_sizes(page)
    page.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, page.width)
    if page.has(f"{source}.gate.expert_bias"):
        page.put(f"{place}.exp_probs_b.bias", page.take(f"{source}.gate.expert_bias", count))
    experts.matrices(page, place, f"{source}.experts", count, width)
    decoder.feed_forward(page, layer, shared * width, source="mlp.shared_experts", suffix="_shexp")


def build_minimax(page: Page) -> None:
    """Converts MiniMax M2, in which the norms of Q and K extend over all heads."""
    settings, width, hidden = page.settings, decoder.feed_forward_width(page), page.width
    count = settings.count("num_local_experts", maximum=experts.MAX_EXPERTS)
    for name, usual in (("scoring_func", "sigmoid"), ("qk_norm_type", "per_layer")):
        if settings.text(name, default=usual) != usual:
            raise settings.error(name, f"{settings.shown(name)} is not supported; supported is {usual}")
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page, default=1e-6)
    turning = settings.count("rotary_dim", default=rotating_channels(page), maximum=page.head_width)
    if turning % 2:
        raise settings.error("rotary_dim", f"expected an even number of channels, found {turning}")
    rotation(page, turning, base=5e6)
    experts.expert_keys(page, count, settings.count("num_experts_per_tok", maximum=count), width)
    page.key("expert_gating_func", experts.SIGMOID)
    decoder.ends(page)
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        mixture = f"{source}.block_sparse_moe"
        decoder.norms(page, layer)
        decoder.attention(page, layer)
        for part, heads in (("q", page.heads), ("k", page.kv_heads)):
            page.copy(f"{place}.attn_{part}_norm", f"{source}.self_attn.{part}_norm", heads * page.head_width)
        page.copy(f"{place}.ffn_gate_inp", f"{mixture}.gate", count, hidden)
        page.put(f"{place}.exp_probs_b.bias", page.take(f"{mixture}.e_score_correction_bias", count))
        experts.matrices(page, place, f"{mixture}.experts", count, width, _MIXTRAL)
