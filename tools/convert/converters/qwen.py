"""Qwen 2, 2.5, 3 and the text model of Qwen 3 VL, dense or with experts."""

from __future__ import annotations

import numpy as np

from llamaclust.tools.convert.lazy import squeezed
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder, experts
from llamaclust.tools.convert.rotation import rotation, sections
from llamaclust.tools.convert.settings import MAX_LAYERS


def build(page: Page) -> None:
    """Converts Qwen models, dense or with experts. Raises ModelFileError if `use_sliding_window` is set."""
    if page.settings.flag("use_sliding_window"):
        raise page.settings.error("use_sliding_window", "true is not supported")
    width = decoder.feed_forward_width(page)
    decoder.usual_keys(page, width)
    decoder.rms_epsilon(page)
    rotation(page, page.head_width, says_dimensions=False)
    if page.architecture.startswith("qwen3vl"):
        _picture_keys(page)
    decoder.ends(page)
    count = _expert_keys(page) if page.architecture.endswith("moe") else 0
    for layer in range(page.layers):
        decoder.norms(page, layer)
        decoder.attention(page, layer, bias=True if page.architecture.startswith("qwen2") else None)
        if page.architecture.startswith("qwen3"):
            for part in ("q", "k"):
                page.copy(
                    f"blk.{layer}.attn_{part}_norm", f"model.layers.{layer}.self_attn.{part}_norm", page.head_width
                )
        if count:
            _experts(page, layer, count)
        else:
            decoder.feed_forward(page, layer, width)


def _picture_keys(page: Page) -> None:
    page.key("rope.dimension_sections", np.array(sections(page.settings, page.head_width // 2), np.int32))
    if page.settings.has("deepstack_layers"):
        page.key("n_deepstack_layers", page.settings.count("deepstack_layers", minimum=0, maximum=MAX_LAYERS))


def _expert_keys(page: Page) -> int:
    settings = page.settings
    count = settings.count("num_experts", "num_local_experts", maximum=1 << 10)
    if settings.count("decoder_sparse_step", default=1) != 1 or settings.values.get("mlp_only_layers"):
        raise settings.error("mlp_only_layers", "layers without experts among layers with experts are not supported")
    page.key("expert_count", count)
    page.key("expert_used_count", settings.count("num_experts_per_tok", maximum=count))
    page.key("expert_feed_forward_length", page.settings.count("moe_intermediate_size"))
    if page.architecture == "qwen2moe":
        page.key("expert_shared_feed_forward_length", settings.count("shared_expert_intermediate_size"))
        if settings.flag("norm_topk_prob"):
            raise settings.error("norm_topk_prob", "true is not supported by qwen2moe")
    elif not settings.flag("norm_topk_prob", default=page.architecture == "qwen3vlmoe"):
        raise settings.error("norm_topk_prob", f"false is not supported by {page.architecture}")
    return count


def _experts(page: Page, layer: int, count: int) -> None:
    prefix, width = f"model.layers.{layer}.mlp", page.settings.count("moe_intermediate_size")
    page.copy(f"blk.{layer}.ffn_gate_inp", f"{prefix}.gate", count, page.width)
    if _has_columns_first(page, f"{prefix}.experts", count, width):
        experts.column_matrices(page, f"blk.{layer}", f"{prefix}.experts", count, width)
    else:
        experts.matrices(page, f"blk.{layer}", f"{prefix}.experts", count, width)
    if page.architecture == "qwen2moe":
        shared = page.settings.count("shared_expert_intermediate_size")
        decoder.feed_forward(page, layer, shared, source="mlp.shared_expert", suffix="_shexp")
        gate = page.take(f"{prefix}.shared_expert_gate.weight", 1, page.width)
        page.put(f"blk.{layer}.ffn_gate_inp_shexp.weight", squeezed(gate))


def _has_columns_first(page: Page, source: str, count: int, width: int) -> bool:
    """Returns True if experts are stored as [experts, inputs, outputs], as in Qwen 3 VL's published checkpoints."""
    both, down = page.shape(f"{source}.gate_up_proj"), page.shape(f"{source}.down_proj")
    return both == (count, page.width, 2 * width) and down == (count, width, page.width)
