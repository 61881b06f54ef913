"""DeepSeek V2 and V3, Kimi K2 and GLM-4.7-Flash become deepseek2. Mistral Small 4 becomes mistral4."""

from __future__ import annotations

from dataclasses import dataclass

from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder, experts
from llamaclust.tools.convert.pages.latent.attention import latent_attention, latent_keys, read_latent
from llamaclust.tools.convert.rotation import latent_rotation, position_scale

_GLM = "glm4moe"


@dataclass(frozen=True, slots=True)
class _Mixture:
    """The gating function of experts (`name` in configurations, `number` in GGUF), with or without bias and groups."""

    name: str
    number: int
    has_bias: bool
    has_groups: bool = True


_V2 = _Mixture("softmax", experts.SOFTMAX, has_bias=False, has_groups=False)
_V3 = _Mixture("sigmoid", experts.SIGMOID, has_bias=True)
_MISTRAL4 = _Mixture("softmax", experts.SOFTMAX, has_bias=False)


def build_v2(page: Page) -> None:
    """Converts DeepSeek V2 Lite. Raises ModelFileError for full models, whose choice of groups GGUF cannot express."""
    settings = page.settings
    method = settings.text("topk_method", default="greedy")
    if method != "greedy" and settings.count("n_group", default=1) != 1:
        raise settings.error(
            "topk_method", f"{shown(method)}: a choice of groups by their best expert is not supported"
        )
    if settings.flag("norm_topk_prob"):
        raise settings.error("norm_topk_prob", "true is not supported by DeepSeek V2")
    _build(page, _V2)


def build_v3(page: Page) -> None:
    """Converts DeepSeek V3, V3.1, R1 and Kimi K2, without layers for multi-token prediction."""
    _build(page, _V3)
    experts.leave_further_layers(page)


def build_glm_flash(page: Page) -> None:
    page.vocabulary_rules = _GLM
    _build(page, _V3, further=experts.further_layers(page))


def build_mistral4(page: Page) -> None:
    _build(page, _MISTRAL4)
    length = position_scale(page)
    if length:
        page.key("attention.temperature_length", length)


def _build(page: Page, mixture: _Mixture, further: int = 0) -> None:
    width, latent = decoder.feed_forward_width(page), read_latent(page)
    dense = experts.leading_dense(page)
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page, default=1e-6)
    latent_rotation(page, latent.rotated)
    latent_keys(page, latent)
    page.key("leading_dense_block_count", dense)
    _expert_keys(page, mixture)
    if further:
        page.key("block_count", page.layers + further)
        page.key("nextn_predict_layers", further)
    decoder.ends(page)
    for layer in range(page.layers + further):
        decoder.norms(page, layer)
        latent_attention(page, layer, latent)
        if layer < dense:
            decoder.feed_forward(page, layer, width)
        else:
            _experts(page, layer, mixture)
        if layer >= page.layers:
            experts.prediction(page, layer)


def _expert_keys(page: Page, mixture: _Mixture) -> None:
    settings = page.settings
    function = settings.text("scoring_func", default=mixture.name)
    if function != mixture.name:
        raise settings.error("scoring_func", f"expected {mixture.name}, found {shown(function)}")
    count, width, shared = _sizes(page)
    used = settings.count("num_experts_per_tok", maximum=count)
    experts.expert_keys(page, count, used, width)
    page.key("expert_shared_count", shared)
    experts.weight_keys(page, mixture.number, normalized=mixture.has_groups)
    if mixture.has_groups:
        experts.group_keys(page, count, used)


def _sizes(page: Page) -> tuple[int, int, int]:
    settings = page.settings
    count = settings.count("n_routed_experts", "num_local_experts", maximum=experts.MAX_EXPERTS)
    shared = settings.count("n_shared_experts", default=0, minimum=0, maximum=experts.MAX_EXPERTS)
    return count, settings.count("moe_intermediate_size"), shared


def _experts(page: Page, layer: int, mixture: _Mixture) -> None:
    place, source = f"blk.{layer}", f"model.layers.{layer}.mlp"
    count, width, shared = _sizes(page)
    page.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, page.width)
    if mixture.has_bias:
        page.put(f"{place}.exp_probs_b.bias", page.take(f"{source}.gate.e_score_correction_bias", count))
    experts.matrices(page, place, f"{source}.experts", count, width)
    if shared:
        decoder.feed_forward(page, layer, shared * width, source="mlp.shared_experts", suffix="_shexp")
