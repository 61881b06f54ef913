"""Mixture-of-experts models: granitemoe, ernie4_5-moe, bailingmoe2, minimax-m2."""

from __future__ import annotations

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder, experts
from llamaclust.tools.convert.converters.dense import granite_scales
from llamaclust.tools.convert.lazy import part_of_each, rows, squeezed
from llamaclust.tools.convert.rotation import rotating_channels, rotation
from llamaclust.tools.convert.settings import MAX_LAYERS

_MIXTRAL = ("w1", "w3", "w2")
_PREDICTIONS = ("model.mtp_block.", "model.mtp_emb_norm.", "model.mtp_hidden_norm.", "model.mtp_linear_proj.")


def build_granite(model: ConvertedModel) -> None:
    settings = model.settings
    width = decoder.feed_forward_width(model)
    shared = settings.count("shared_intermediate_size", default=0, minimum=0)
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model)
    granite_scales(model)
    rotation(model, model.head_width)
    granite_expert_keys(model, shared)
    decoder.ends(model)
    for layer in range(model.layers):
        decoder.norms(model, layer)
        decoder.attention(model, layer)
        granite_experts(model, layer, shared)


def granite_expert_keys(model: ConvertedModel, shared: int) -> None:
    count = model.settings.count("num_local_experts", maximum=experts.MAX_EXPERTS)
    model.key("expert_count", count)
    model.key("expert_used_count", model.settings.count("num_experts_per_tok", maximum=count))
    if shared:
        model.key("expert_shared_feed_forward_length", shared)


def granite_experts(model: ConvertedModel, layer: int, shared: int) -> None:
    place, source, hidden = f"blk.{layer}", f"model.layers.{layer}.block_sparse_moe", model.width
    count = model.settings.count("num_local_experts", maximum=experts.MAX_EXPERTS)
    width = decoder.feed_forward_width(model)
    model.copy(f"{place}.ffn_gate_inp", f"{source}.router.layer", count, hidden)
    both = model.take(f"{source}.input_linear.weight", count, 2 * width, hidden)
    model.put(f"{place}.ffn_gate_exps.weight", part_of_each(both, 0, width))
    model.put(f"{place}.ffn_up_exps.weight", part_of_each(both, width, 2 * width))
    model.copy(f"{place}.ffn_down_exps", f"{source}.output_linear", count, hidden, width)
    if shared:
        granite_feed_forward(model, layer, shared, "_shexp")


def granite_feed_forward(model: ConvertedModel, layer: int, width: int, suffix: str = "") -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}.shared_mlp"
    whole = model.take(f"{source}.input_linear.weight", 2 * width, model.width)
    model.put(f"{place}.ffn_gate{suffix}.weight", rows(whole, 0, width))
    model.put(f"{place}.ffn_up{suffix}.weight", rows(whole, width, 2 * width))
    model.copy(f"{place}.ffn_down{suffix}", f"{source}.output_linear", model.width, width)


def build_ernie(model: ConvertedModel) -> None:
    """Converts ERNIE 4.5 with experts. Drops layers for multi-token prediction."""
    settings, width = model.settings, decoder.feed_forward_width(model)
    if settings.flag("use_bias"):
        raise settings.error("use_bias", "true is not supported by ernie4_5-moe")
    first = settings.count("moe_layer_start_index", minimum=0, maximum=MAX_LAYERS)
    step = settings.count("moe_layer_interval", default=1, maximum=MAX_LAYERS)
    last = settings.count("moe_layer_end_index", default=model.layers - 1, minimum=0, maximum=MAX_LAYERS)
    if last < model.layers - 1:
        raise settings.error(
            "moe_layer_end_index", f"{last} is not supported; expected {model.layers - 1}, the last layer"
        )
    decoder.usual_keys(model, width)
    decoder.rms_epsilon(model)
    rotation(model, model.head_width, base=500000.0)
    model.key("leading_dense_block_count", first)
    model.key("interleave_moe_layer_step", step)
    _ernie_keys(model)
    decoder.ends(model)
    for layer in range(model.layers):
        decoder.norms(model, layer)
        decoder.attention(model, layer)
        if layer >= first and (layer + 1) % step == 0:
            _ernie_experts(model, layer)
        else:
            decoder.feed_forward(model, layer, width)
    if model.leave(*_PREDICTIONS):
        model.notes.append(experts.NO_PREDICTIONS)


def _ernie_keys(model: ConvertedModel) -> None:
    settings = model.settings
    count = settings.count("moe_num_experts", maximum=experts.MAX_EXPERTS)
    experts.expert_keys(model, count, settings.count("moe_k", maximum=count), settings.count("moe_intermediate_size"))
    shared = settings.count("moe_num_shared_experts", default=0, minimum=0, maximum=experts.MAX_EXPERTS)
    model.key("expert_shared_count", shared)
    model.key("expert_shared_feed_forward_length", shared * settings.count("moe_intermediate_size"))


def _ernie_experts(model: ConvertedModel, layer: int) -> None:
    settings, place, source = model.settings, f"blk.{layer}", f"model.layers.{layer}.mlp"
    count, width = (
        settings.count("moe_num_experts", maximum=experts.MAX_EXPERTS),
        settings.count("moe_intermediate_size"),
    )
    shared = width * settings.count("moe_num_shared_experts", default=0, minimum=0, maximum=experts.MAX_EXPERTS)
    model.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, model.width)
    bias = model.take(f"{source}.moe_statics.e_score_correction_bias", 1, count)
    model.put(f"{place}.exp_probs_b.bias", squeezed(bias))
    experts.matrices(model, place, f"{source}.experts", count, width)
    if shared:
        decoder.feed_forward(model, layer, shared, source="mlp.shared_experts", suffix="_shexp")


def build_bailing(model: ConvertedModel) -> None:
    """Converts Ling and Ring 2.0. Drops layers for multi-token prediction."""
    settings, width, hidden = model.settings, decoder.feed_forward_width(model), model.width
    for name, wanted in (("use_bias", False), ("use_qkv_bias", False), ("use_qk_norm", True)):
        if settings.flag(name, default=wanted) is not wanted:
            raise settings.error(name, f"{str(not wanted).lower()} is not supported by bailingmoe2")
    dense = experts.leading_dense(model)
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model, default=1e-6)
    rotation(model, rotating_channels(model, 0.5))
    model.key("leading_dense_block_count", dense)
    _bailing_keys(model)
    model.copy("token_embd", "model.word_embeddings", model.words, hidden)
    model.copy("output_norm", "model.norm", hidden)
    model.output()
    queries, packed = model.heads * model.head_width, (model.heads + 2 * model.kv_heads) * model.head_width
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}.attention"
        decoder.norms(model, layer)
        model.copy(f"{place}.attn_qkv", f"{source}.query_key_value", packed, hidden)
        model.copy(f"{place}.attn_q_norm", f"{source}.query_layernorm", model.head_width)
        model.copy(f"{place}.attn_k_norm", f"{source}.key_layernorm", model.head_width)
        model.copy(f"{place}.attn_output", f"{source}.dense", hidden, queries)
        if layer < dense:
            decoder.feed_forward(model, layer, width)
        else:
            _bailing_experts(model, layer)
    experts.leave_further_layers(model)


def _bailing_sizes(model: ConvertedModel) -> tuple[int, int, int]:
    settings = model.settings
    shared = settings.count("num_shared_experts", maximum=experts.MAX_EXPERTS)
    return settings.count("num_experts", maximum=experts.MAX_EXPERTS), settings.count("moe_intermediate_size"), shared


def _bailing_keys(model: ConvertedModel) -> None:
    settings = model.settings
    if settings.text("score_function", default="sigmoid") != "sigmoid":
        raise settings.error("score_function", f"{settings.shown('score_function')} is not supported; expected sigmoid")
    count, width, shared = _bailing_sizes(model)
    used = settings.count("num_experts_per_tok", maximum=count)
    experts.expert_keys(model, count, used, width)
    model.key("expert_shared_count", shared)
    model.key("expert_shared_feed_forward_length", width)
    experts.weight_keys(model, experts.SIGMOID, normalized=True)
    experts.group_keys(model, count, used)


def _bailing_experts(model: ConvertedModel, layer: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}.mlp"
    count, width, shared = _bailing_sizes(model)
    model.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, model.width)
    if model.has(f"{source}.gate.expert_bias"):
        model.put(f"{place}.exp_probs_b.bias", model.take(f"{source}.gate.expert_bias", count))
    experts.matrices(model, place, f"{source}.experts", count, width)
    decoder.feed_forward(model, layer, shared * width, source="mlp.shared_experts", suffix="_shexp")


def build_minimax(model: ConvertedModel) -> None:
    """Converts MiniMax M2, in which the norms of Q and K extend over all heads."""
    settings, width, hidden = model.settings, decoder.feed_forward_width(model), model.width
    count = settings.count("num_local_experts", maximum=experts.MAX_EXPERTS)
    for name, usual in (("scoring_func", "sigmoid"), ("qk_norm_type", "per_layer")):
        if settings.text(name, default=usual) != usual:
            raise settings.error(name, f"{settings.shown(name)} is not supported; expected {usual}")
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model, default=1e-6)
    turning = settings.count("rotary_dim", default=rotating_channels(model), maximum=model.head_width)
    if turning % 2:
        raise settings.error("rotary_dim", f"expected an even number of channels, found {turning}")
    rotation(model, turning, base=5e6)
    experts.expert_keys(model, count, settings.count("num_experts_per_tok", maximum=count), width)
    model.key("expert_gating_func", experts.SIGMOID)
    decoder.ends(model)
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        mixture = f"{source}.block_sparse_moe"
        decoder.norms(model, layer)
        decoder.attention(model, layer)
        for part, heads in (("q", model.heads), ("k", model.kv_heads)):
            model.copy(f"{place}.attn_{part}_norm", f"{source}.self_attn.{part}_norm", heads * model.head_width)
        model.copy(f"{place}.ffn_gate_inp", f"{mixture}.gate", count, hidden)
        model.put(f"{place}.exp_probs_b.bias", model.take(f"{mixture}.e_score_correction_bias", count))
        experts.matrices(model, place, f"{mixture}.experts", count, width, _MIXTRAL)
