"""Nemotron H, Nemotron Nano 2 and Nemotron 3: each layer is Mamba 2, attention, a feed-forward network or experts."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from llamaclust.model.checkpoints.settings import Settings
from llamaclust.tools.convert.converted_model import ConvertedModel, neighbours
from llamaclust.tools.convert.converters import decoder, experts
from llamaclust.tools.convert.converters.recurrent.mamba import Mamba, mamba_keys, read_mamba, write_mamba
from llamaclust.tools.convert.lazy import stacked

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


def build(model: ConvertedModel) -> None:
    settings, kinds = model.settings, _kinds(model)
    if "moe" in kinds and "mlp" in kinds:
        raise settings.error("layers_block_type", "a model with both mlp and moe layers is not supported")
    if "moe" in kinds:
        model.architecture = "nemotron_h_moe"
    mamba = read_mamba(model, None)
    width = settings.count("moe_intermediate_size" if "moe" in kinds else "intermediate_size")
    _keys(model, kinds, width)
    mamba_keys(model, mamba)
    if "moe" in kinds:
        _expert_keys(model)
    root = "backbone" if model.has("backbone.embeddings.weight") else "model"
    model.copy("token_embd", f"{root}.embeddings", model.words, model.width)
    model.copy("output_norm", f"{root}.norm_f", model.width)
    model.output()
    for layer, kind in enumerate(kinds):
        place, source = f"blk.{layer}", f"{root}.layers.{layer}"
        model.copy(f"{place}.attn_norm", f"{source}.norm", model.width)
        _layer(model, place, f"{source}.mixer", kind, mamba)
    if model.leave("mtp."):
        model.notes.append(experts.NO_PREDICTIONS)


def _kinds(model: ConvertedModel) -> list[str]:
    """Returns each layer's kind. Adds the layer count and head width to the model's settings if they are missing."""
    settings = model.settings
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
    model.settings = Settings(values, settings.origin)
    return decoder.layer_kinds(model, "layers_block_type", _KINDS)


def _keys(model: ConvertedModel, kinds: list[str], width: int) -> None:
    decoder.refuse(model, "mlp_bias", "use_bias", "attention_bias", "mamba_proj_bias")
    decoder.activation(model, _RELU_SQUARED, "mlp_hidden_act")
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    model.key("feed_forward_length", np.array([width * (kind in ("mlp", "moe")) for kind in kinds], np.int32))
    counts = [model.kv_heads * (kind == "attention") for kind in kinds]
    model.key("attention.head_count_kv", np.array(counts, np.int32))
    decoder.rms_epsilon(model, "layer_norm_epsilon", "rms_norm_eps", default=1e-5)
    model.key("attention.layer_norm_epsilon", model.metadata[f"{model.architecture}.attention.layer_norm_rms_epsilon"])


def _expert_keys(model: ConvertedModel) -> None:
    settings = model.settings
    count = settings.count("n_routed_experts", maximum=experts.MAX_EXPERTS)
    used = settings.count("num_experts_per_tok", maximum=count)
    experts.expert_keys(model, count, used, settings.count("moe_intermediate_size"))
    experts.weight_keys(model, experts.SIGMOID, normalized=True)
    experts.group_keys(model, count, used)
    model.key("expert_shared_feed_forward_length", settings.count("moe_shared_expert_intermediate_size"))
    model.key("expert_shared_count", settings.count("n_shared_experts", default=1, maximum=experts.MAX_EXPERTS))
    if settings.has("moe_latent_size"):
        model.key("moe_latent_size", settings.count("moe_latent_size"))


def _layer(model: ConvertedModel, place: str, source: str, kind: str, mamba: Mamba) -> None:
    if kind == "mamba":
        write_mamba(model, place, source, mamba)
    elif kind == "attention":
        _attention(model, place, source)
    elif kind == "moe":
        _experts(model, place, source)
    else:
        _feed_forward(model, place, source, model.settings.count("intermediate_size"))


def _attention(model: ConvertedModel, place: str, source: str) -> None:
    """Copies attention. Rows of Q and K are permuted as in llama.cpp's conversion, although the model has no RoPE."""
    query, key = model.heads * model.head_width, model.kv_heads * model.head_width
    for part, heads in (("q", model.heads), ("k", model.kv_heads)):
        found = model.take(f"{source}.{part}_proj.weight", heads * model.head_width, model.width)
        model.put(f"{place}.attn_{part}.weight", neighbours(found, heads))
    model.copy(f"{place}.attn_v", f"{source}.v_proj", key, model.width)
    model.copy(f"{place}.attn_output", f"{source}.o_proj", model.width, query)


def _feed_forward(model: ConvertedModel, place: str, source: str, width: int, suffix: str = "") -> None:
    model.copy(f"{place}.ffn_up{suffix}", f"{source}.up_proj", width, model.width)
    model.copy(f"{place}.ffn_down{suffix}", f"{source}.down_proj", model.width, width)


def _experts(model: ConvertedModel, place: str, source: str) -> None:
    settings, hidden = model.settings, model.width
    count, width = (
        settings.count("n_routed_experts", maximum=experts.MAX_EXPERTS),
        settings.count("moe_intermediate_size"),
    )
    read = settings.count("moe_latent_size", default=hidden)
    model.copy(f"{place}.ffn_gate_inp", f"{source}.gate", count, hidden)
    model.put(f"{place}.exp_probs_b.bias", model.take(f"{source}.gate.e_score_correction_bias", count))
    for part, shape in (("up", (width, read)), ("down", (read, width))):
        found = [model.take(f"{source}.experts.{number}.{part}_proj.weight", *shape) for number in range(count)]
        model.put(f"{place}.ffn_{part}_exps.weight", stacked(found))
    if settings.has("moe_latent_size"):
        model.copy(f"{place}.ffn_latent_down", f"{source}.fc1_latent_proj", read, hidden)
        model.copy(f"{place}.ffn_latent_up", f"{source}.fc2_latent_proj", hidden, read)
    shared = settings.count("moe_shared_expert_intermediate_size")
    _feed_forward(model, place, f"{source}.shared_experts", shared, "_shexp")
