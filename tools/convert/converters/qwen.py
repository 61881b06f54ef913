"""Qwen 2, 2.5, 3 and the text model of Qwen 3 VL, dense or with experts."""

from __future__ import annotations

import numpy as np

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder, experts
from llamaclust.tools.convert.lazy import squeezed
from llamaclust.tools.convert.rotation import rotation, sections
from llamaclust.tools.convert.settings import MAX_LAYERS


def build(model: ConvertedModel) -> None:
    """Converts Qwen models, dense or with experts. Raises ModelFileError if `use_sliding_window` is set."""
    if model.settings.flag("use_sliding_window"):
        raise model.settings.error("use_sliding_window", "true is not supported")
    width = decoder.feed_forward_width(model)
    decoder.usual_keys(model, width)
    decoder.rms_epsilon(model)
    rotation(model, model.head_width, says_dimensions=False)
    if model.architecture.startswith("qwen3vl"):
        _picture_keys(model)
    decoder.ends(model)
    count = _expert_keys(model) if model.architecture.endswith("moe") else 0
    for layer in range(model.layers):
        decoder.norms(model, layer)
        decoder.attention(model, layer, bias=True if model.architecture.startswith("qwen2") else None)
        if model.architecture.startswith("qwen3"):
            for part in ("q", "k"):
                model.copy(
                    f"blk.{layer}.attn_{part}_norm", f"model.layers.{layer}.self_attn.{part}_norm", model.head_width
                )
        if count:
            _experts(model, layer, count)
        else:
            decoder.feed_forward(model, layer, width)


def _picture_keys(model: ConvertedModel) -> None:
    model.key("rope.dimension_sections", np.array(sections(model.settings, model.head_width // 2), np.int32))
    if model.settings.has("deepstack_layers"):
        model.key("n_deepstack_layers", model.settings.count("deepstack_layers", minimum=0, maximum=MAX_LAYERS))


def _expert_keys(model: ConvertedModel) -> int:
    settings = model.settings
    count = settings.count("num_experts", "num_local_experts", maximum=1 << 10)
    if settings.count("decoder_sparse_step", default=1) != 1 or settings.values.get("mlp_only_layers"):
        raise settings.error("mlp_only_layers", "layers without experts among layers with experts are not supported")
    model.key("expert_count", count)
    model.key("expert_used_count", settings.count("num_experts_per_tok", maximum=count))
    model.key("expert_feed_forward_length", model.settings.count("moe_intermediate_size"))
    if model.architecture == "qwen2moe":
        model.key("expert_shared_feed_forward_length", settings.count("shared_expert_intermediate_size"))
        if settings.flag("norm_topk_prob"):
            raise settings.error("norm_topk_prob", "true is not supported by qwen2moe")
    elif not settings.flag("norm_topk_prob", default=model.architecture == "qwen3vlmoe"):
        raise settings.error("norm_topk_prob", f"false is not supported by {model.architecture}")
    return count


def _experts(model: ConvertedModel, layer: int, count: int) -> None:
    prefix, width = f"model.layers.{layer}.mlp", model.settings.count("moe_intermediate_size")
    model.copy(f"blk.{layer}.ffn_gate_inp", f"{prefix}.gate", count, model.width)
    if _has_columns_first(model, f"{prefix}.experts", count, width):
        experts.column_matrices(model, f"blk.{layer}", f"{prefix}.experts", count, width)
    else:
        experts.matrices(model, f"blk.{layer}", f"{prefix}.experts", count, width)
    if model.architecture == "qwen2moe":
        shared = model.settings.count("shared_expert_intermediate_size")
        decoder.feed_forward(model, layer, shared, source="mlp.shared_expert", suffix="_shexp")
        gate = model.take(f"{prefix}.shared_expert_gate.weight", 1, model.width)
        model.put(f"blk.{layer}.ffn_gate_inp_shexp.weight", squeezed(gate))


def _has_columns_first(model: ConvertedModel, source: str, count: int, width: int) -> bool:
    """Returns True if experts are stored as [experts, inputs, outputs], as in Qwen 3 VL's published checkpoints."""
    both, down = model.shape(f"{source}.gate_up_proj"), model.shape(f"{source}.down_proj")
    return both == (count, model.width, 2 * width) and down == (count, width, model.width)
