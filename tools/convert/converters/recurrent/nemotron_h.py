"""Nemotron H, Nemotron Nano 2 and Nemotron 3: each layer is Mamba 2, attention, a feed-forward network or experts."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from llamaclust.model.checkpoints.settings import Settings
from llamaclust.tools.convert.lazy import stacked
from llamaclust.tools.convert.page import Page, neighbours
from llamaclust.tools.convert.pages import decoder, experts
from llamaclust.tools.convert.pages.recurrent.mamba import Mamba, mamba_keys, read_mamba, write_mamba

_KINDS = MappingProxyType(
    {
        "mamba": "mamba",
        "linear_attention": "mamba",
        "attention": "attention",
        "full_attention": "attention",
        "mlp": "mlp",
        "moe": "moe",
    }
)
_LETTERS = MappingProxyType({"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"})
_RELU_SQUARED = ("relu2",)
_HEAD = 128  # Default for configurations without a head width.


def build(page: Page) -> None:
    settings, kinds = page.settings, _kinds(page)
    if "moe" in kinds and "mlp" in kinds:
        raise settings.error("layers_block_type", "feed-forward networks among layers with experts are not supported")
    if "moe" in kinds:
        page.architecture = "nemotron_h_moe"
    mamba = read_mamba(page, None)
    width = settings.count("moe_intermediate_size" if "moe" in kinds else "intermediate_size")
    _keys(page, kinds, width)
    mamba_keys(page, mamba)
    if "moe" in kinds:
        _expert_keys(page)
    root = "backbone" if page.has("backbone.embeddings.weight") else "model"
    page.copy("token_embd", f"{root}.embeddings", page.words, page.width)
    page.copy("output_norm", f"{root}.norm_f", page.width)
    page.output()
    for layer, kind in enumerate(kinds):
        place, source = f"blk.{layer}", f"{root}.layers.{layer}"
        page.copy(f"{place}.attn_norm", f"{source}.norm", page.width)
        _layer(page, place, f"{source}.mixer", kind, mamba)
    if page.leave("mtp."):
        page.notes.append(experts.NO_PREDICTIONS)


def _kinds(page: Page) -> list[str]:
    """Returns each layer's kind. Adds the layer count and head width to the page's settings if they are missing."""
    settings = page.settings
    values = dict(settings.values)
    listed = next((values[name] for name in ("layers_block_type", "layer_types") if settings.has(name)), None)
    pattern = values.get("hybrid_override_pattern")
    if listed is None and isinstance(pattern, str):
        listed = [_LETTERS.get(letter, letter) for letter in pattern]
    values["layers_block_type"] = listed
    if isinstance(listed, list) and not settings.has("num_hidden_layers"):
        values["num_hidden_layers"] = len(listed)
    if not settings.has("head_dim"):
        values["head_dim"] = values.get("attention_head_dim", _HEAD)
    page.settings = Settings(values, settings.origin)
    return decoder.layer_kinds(page, "layers_block_type", _KINDS)


def _keys(page: Page, kinds: list[str], width: int) -> None:
    decoder.refuse(page, "mlp_bias", "use_bias", "attention_bias", "mamba_proj_bias")
    decoder.activation(page, _RELU_SQUARED, "mlp_hidden_act")
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    page.key("feed_forward_length", np.array([width * (kind in ("mlp", "moe")) for kind in kinds], np.int32))
    counts = [page.kv_heads * (kind == "attention") for kind in kinds]
    page.key("attention.head_count_kv", np.array(counts, np.int32))
    decoder.rms_epsilon(page, "layer_norm_epsilon", "rms_norm_eps", default=1e-5)
    page.key("attention.layer_norm_epsilon", page.metadata[f"{page.architecture}.attention.layer_norm_rms_epsilon"])


def _expert_keys(page: Page) -> None:
    settings = page.settings
    count = settings.count("n_routed_experts", maximum=experts.MAX_EXPERTS)
    used = settings.count("num_experts_per_tok", maximum=count)
    experts.expert_keys(page, count, used, settings.count("moe_intermediate_size"))
    experts.weight_keys(page, experts.SIGMOID, normalized=True)
    experts.group_keys(page, count, used)
    page.key("expert_shared_feed_forward_length", settings.count("moe_shared_expert_intermediate_size"))
    page.key("expert_shared_count", settings.count("n_shared_experts", default=1, maximum=experts.MAX_EXPERTS))
    if settings.has("moe_latent_size"):
        page.key("moe_latent_size", settings.count("moe_latent_size"))


def _layer(page: Page, place: str, source: str, kind: str, mamba: Mamba) -> None:
    if kind == "mamba":
        write_mamba(page, place, source, mamba)
    elif kind == "attention":
        _attention(page, place, source)
    elif kind == "moe":
        _experts(page, place, source)
    else:
        _feed_forward(page, place, source, page.settings.count("intermediate_size"))


def _attention(page: Page, place: str, source: str) -> None:
    """Copies attention. Rows of Q and K are permuted as in llama.cpp's conversion, although the model has no RoPE."""
    query, key = page.heads * page.head_width, page.kv_heads * page.head_width
    for part, heads in (("q", page.heads), ("k", page.kv_heads)):
        found = page.take(f"{source}.{part}_proj.weight", heads * page.head_width, page.width)
        page.put(f"{place}.attn_{part}.weight", neighbours(found, heads))
    page.copy(f"{place}.attn_v", f"{source}.v_proj", key, page.width)
    page.copy(f"{place}.attn_output", f"{source}.o_proj", page.width, query)


def _feed_forward(page: Page, place: str, source: str, width: int, suffix: str = "") -> None:
    page.copy(f"{place}.ffn_up{suffix}", f"{source}.up_proj", width, page.width)
    page.copy(f"{place}.ffn_down{suffix}", f"{source}.down_proj", page.width, width)


def _experts(page: Page, place: str, source: str) -> None:
    settings, hidden = page.settings, page.width
    count, width = (
        settings.count("n_routed_experts", maximum=experts.MAX_EXPERTS),
        settings.count("moe_intermediate_size"),
    )
    read = settings.count("moe_latent_size", default=hidden)
    page.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, hidden)
    page.put(f"{place}.exp_probs_b.bias", page.take(f"{source}.gate.e_score_correction_bias", count))
    for part, shape in (("up", (width, read)), ("down", (read, width))):
        found = [page.take(f"{source}.experts.{number}.{part}_proj.weight", *shape) for number in range(count)]
        page.put(f"{place}.ffn_{part}_exps.weight", stacked(found))
    if settings.has("moe_latent_size"):
        page.copy(f"{place}.ffn_latent_down", f"{source}.fc1_latent_proj", read, hidden)
        page.copy(f"{place}.ffn_latent_up", f"{source}.fc2_latent_proj", hidden, read)
    shared = settings.count("moe_shared_expert_intermediate_size")
    _feed_forward(page, place, f"{source}.shared_experts", shared, "_shexp")
