"""GLM 4.5, 4.6 and Air. The layers for multi-token prediction come last."""

from __future__ import annotations

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder, experts
from llamaclust.tools.convert.rotation import rotating_channels, rotation
from llamaclust.tools.convert.settings import MAX_LAYERS


def build(model: ConvertedModel) -> None:
    settings, width = model.settings, decoder.feed_forward_width(model)
    if settings.count("n_group", default=1) != 1:
        raise settings.error("n_group", f"{settings.shown('n_group')} is not supported; expected one group of experts")
    decoder.usual_keys(model, width)
    decoder.rms_epsilon(model, default=1e-5)
    rotation(model, rotating_channels(model, 0.5))
    further = experts.further_layers(model)
    if further:
        model.key("block_count", model.layers + further)
        model.key("nextn_predict_layers", further)
    dense = settings.count("first_k_dense_replace", default=1, minimum=0, maximum=MAX_LAYERS)
    model.key("leading_dense_block_count", dense)
    _expert_keys(model)
    decoder.ends(model)
    for layer in range(model.layers + further):
        _moe_attention(model, layer)
        if layer < dense:
            decoder.feed_forward(model, layer, width)
        else:
            _experts(model, layer)
        if layer >= model.layers:
            experts.prediction(model, layer)


def _expert_keys(model: ConvertedModel) -> None:
    settings = model.settings
    count = settings.count("n_routed_experts", maximum=experts.MAX_EXPERTS)
    experts.expert_keys(
        model, count, settings.count("num_experts_per_tok", maximum=count), settings.count("moe_intermediate_size")
    )
    model.key("expert_shared_count", settings.count("n_shared_experts", default=1, maximum=experts.MAX_EXPERTS))
    experts.weight_keys(model, experts.SIGMOID, normalized=True)


def _moe_attention(model: ConvertedModel, layer: int) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}"
    model.copy(f"{place}.attn_norm", f"{source}.input_layernorm", model.width)
    model.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", model.width)
    decoder.attention(model, layer)
    if model.settings.flag("use_qk_norm"):
        for part in ("q", "k"):
            model.copy(f"{place}.attn_{part}_norm", f"{source}.self_attn.{part}_norm", model.head_width)


def _experts(model: ConvertedModel, layer: int) -> None:
    settings, place, source = model.settings, f"blk.{layer}", f"model.layers.{layer}.mlp"
    count, width = (
        settings.count("n_routed_experts", maximum=experts.MAX_EXPERTS),
        settings.count("moe_intermediate_size"),
    )
    model.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, model.width)
    model.put(f"{place}.exp_probs_b.bias", model.take(f"{source}.gate.e_score_correction_bias", count))
    experts.matrices(model, place, f"{source}.experts", count, width)
    shared = width * settings.count("n_shared_experts", default=1, maximum=experts.MAX_EXPERTS)
    decoder.feed_forward(model, layer, shared, source="mlp.shared_experts", suffix="_shexp")
