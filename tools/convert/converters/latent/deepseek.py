"""Converts DeepSeek V2 and V3, Kimi K2 and GLM-4.7-Flash to deepseek2, and Mistral Small 4 to mistral4."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder, experts
from llamaclust.tools.convert.converters.latent.attention import latent_attention, latent_keys, read_latent
from llamaclust.tools.convert.rotation import latent_rotation, position_scale

_GLM = "glm4moe"


@dataclass(frozen=True, slots=True)
class _Mixture:
    """Rules for choosing experts. Configurations call the gating function `name`, and GGUF gives it a `number`."""

    name: str
    number: int
    has_bias: bool
    has_groups: bool = True


_V2 = _Mixture("softmax", experts.SOFTMAX, has_bias=False, has_groups=False)
_V3 = _Mixture("sigmoid", experts.SIGMOID, has_bias=True)
_MISTRAL4 = _Mixture("softmax", experts.SOFTMAX, has_bias=False)


def build_v2(model: ConvertedModel) -> None:
    """Converts DeepSeek V2 Lite. Raises ModelFileError for V2, because GGUF cannot express V2's choice of groups."""
    settings = model.settings
    method = settings.text("topk_method", default="greedy")
    if method != "greedy" and settings.count("n_group", default=1) != 1:
        raise settings.error("topk_method", f"{shown(method)} is not supported; expected greedy")
    if settings.flag("norm_topk_prob"):
        raise settings.error("norm_topk_prob", "true is not supported by DeepSeek V2")
    _build(model, _V2)


def build_v3(model: ConvertedModel) -> None:
    """Converts DeepSeek V3, V3.1, R1 and Kimi K2. Drops layers for multi-token prediction."""
    _build(model, _V3)
    experts.leave_further_layers(model)


def build_glm_flash(model: ConvertedModel) -> None:
    model.vocabulary_rules = _GLM
    _build(model, _V3, further=experts.further_layers(model))


def build_mistral4(model: ConvertedModel) -> None:
    _build(model, _MISTRAL4)
    length = position_scale(model)
    if length:
        model.key("attention.temperature_length", length)


def _build(model: ConvertedModel, mixture: _Mixture, further: int = 0) -> None:
    width, latent = decoder.feed_forward_width(model), read_latent(model)
    dense = experts.leading_dense(model)
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model, default=1e-6)
    latent_rotation(model, latent.rotated)
    latent_keys(model, latent)
    model.key("leading_dense_block_count", dense)
    _expert_keys(model, mixture)
    if further:
        model.key("block_count", model.layers + further)
        model.key("nextn_predict_layers", further)
    decoder.ends(model)
    for layer in range(model.layers + further):
        decoder.norms(model, layer)
        latent_attention(model, layer, latent)
        if layer < dense:
            decoder.feed_forward(model, layer, width)
        else:
            _experts(model, layer, mixture)
        if layer >= model.layers:
            experts.prediction(model, layer)


def _expert_keys(model: ConvertedModel, mixture: _Mixture) -> None:
    settings = model.settings
    function = settings.text("scoring_func", default=mixture.name)
    if function != mixture.name:
        raise settings.error("scoring_func", f"expected {mixture.name}, found {shown(function)}")
    count, width, shared = _sizes(model)
    used = settings.count("num_experts_per_tok", maximum=count)
    experts.expert_keys(model, count, used, width)
    model.key("expert_shared_count", shared)
    experts.weight_keys(model, mixture.number, normalized=mixture.has_groups)
    if mixture.has_groups:
        experts.group_keys(model, count, used)


def _sizes(model: ConvertedModel) -> tuple[int, int, int]:
    settings = model.settings
    count = settings.count("n_routed_experts", "num_local_experts", maximum=experts.MAX_EXPERTS)
    shared = settings.count("n_shared_experts", default=0, minimum=0, maximum=experts.MAX_EXPERTS)
    return count, settings.count("moe_intermediate_size"), shared


def _experts(model: ConvertedModel, layer: int, mixture: _Mixture) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}.mlp"
    count, width, shared = _sizes(model)
    model.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, model.width)
    if mixture.has_bias:
        model.put(f"{place}.exp_probs_b.bias", model.take(f"{source}.gate.e_score_correction_bias", count))
    experts.matrices(model, place, f"{source}.experts", count, width)
    if shared:
        decoder.feed_forward(model, layer, shared * width, source="mlp.shared_experts", suffix="_shexp")
