"""Granite 4.0 with Mamba 2 in most layers. A model without Mamba 2 becomes granite or granitemoe."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.pages.dense import granite_scales
from llamaclust.tools.convert.pages.mixtures import granite_expert_keys, granite_experts, granite_feed_forward
from llamaclust.tools.convert.pages.recurrent.mamba import Mamba, mamba_keys, read_mamba, write_mamba
from llamaclust.tools.convert.rotation import rotation

_KINDS = MappingProxyType(
    {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention"}
)
_POSITIONS = ("rope", "nope")


def build(page: Page) -> None:
    settings = page.settings
    kinds = decoder.layer_kinds(page, "layer_types" if settings.has("layer_types") else "layers_block_type", _KINDS)
    shared = settings.count("shared_intermediate_size")
    has_experts = settings.count("num_local_experts", default=0, minimum=0) > 0
    if "mamba" not in kinds:
        page.architecture = "granitemoe" if has_experts else "granite"
    mamba = read_mamba(page, settings.count("mamba_expand", default=2) * page.width) if "mamba" in kinds else None
    _keys(page, kinds, mamba, shared if not has_experts else settings.count("intermediate_size"))
    if has_experts:
        granite_expert_keys(page, shared)
    decoder.ends(page)
    for layer, kind in enumerate(kinds):
        decoder.norms(page, layer)
        if kind == "attention" or mamba is None:
            decoder.attention(page, layer)
        else:
            write_mamba(page, f"blk.{layer}", f"model.layers.{layer}.mamba", mamba)
        if has_experts:
            granite_experts(page, layer, shared)
        else:
            granite_feed_forward(page, layer, shared)


def _keys(page: Page, kinds: list[str], mamba: Mamba | None, width: int) -> None:
    settings = page.settings
    decoder.activation(page, decoder.SILU, "hidden_act")
    decoder.refuse(page, "mamba_proj_bias")
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page)
    granite_scales(page)
    rotation(page, page.head_width)
    positions = settings.text("position_embedding_type", default="nope")
    if positions not in _POSITIONS:
        raise settings.error(
            "position_embedding_type", f"{shown(positions)} is not known; known: {', '.join(_POSITIONS)}"
        )
    page.key("rope.scaling.finetuned", positions == "rope")
    if mamba is not None:
        mamba_keys(page, mamba)
        counts = [page.kv_heads * (kind == "attention") for kind in kinds]
        page.key("attention.head_count_kv", np.array(counts, np.int32))
