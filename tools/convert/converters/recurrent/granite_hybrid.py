"""Granite 4.0 with Mamba 2 in most layers. A model without Mamba 2 is converted to granite or granitemoe."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from llamaclust.model.gguf.values import shown
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.converters.dense import granite_scales
from llamaclust.tools.convert.converters.mixtures import granite_expert_keys, granite_experts, granite_feed_forward
from llamaclust.tools.convert.converters.recurrent.mamba import Mamba, mamba_keys, read_mamba, write_mamba
from llamaclust.tools.convert.rotation import rotation

_KINDS = MappingProxyType(
    {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention"}
)
_POSITIONS = ("rope", "nope")


def build(model: ConvertedModel) -> None:
    settings = model.settings
    kinds = decoder.layer_kinds(model, "layer_types" if settings.has("layer_types") else "layers_block_type", _KINDS)
    shared = settings.count("shared_intermediate_size")
    has_experts = settings.count("num_local_experts", default=0, minimum=0) > 0
    if "mamba" not in kinds:
        model.architecture = "granitemoe" if has_experts else "granite"
    mamba = read_mamba(model, settings.count("mamba_expand", default=2) * model.width) if "mamba" in kinds else None
    _keys(model, kinds, mamba, shared if not has_experts else settings.count("intermediate_size"))
    if has_experts:
        granite_expert_keys(model, shared)
    decoder.ends(model)
    for layer, kind in enumerate(kinds):
        decoder.norms(model, layer)
        if kind == "attention" or mamba is None:
            decoder.attention(model, layer)
        else:
            write_mamba(model, f"blk.{layer}", f"model.layers.{layer}.mamba", mamba)
        if has_experts:
            granite_experts(model, layer, shared)
        else:
            granite_feed_forward(model, layer, shared)


def _keys(model: ConvertedModel, kinds: list[str], mamba: Mamba | None, width: int) -> None:
    settings = model.settings
    decoder.activation(model, decoder.SILU, "hidden_act")
    decoder.refuse(model, "mamba_proj_bias")
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model)
    granite_scales(model)
    rotation(model, model.head_width)
    positions = settings.text("position_embedding_type", default="nope")
    if positions not in _POSITIONS:
        raise settings.error(
            "position_embedding_type", f"{shown(positions)} is not known; known: {', '.join(_POSITIONS)}"
        )
    model.key("rope.scaling.finetuned", positions == "rope")
    if mamba is not None:
        mamba_keys(model, mamba)
        counts = [model.kv_heads * (kind == "attention") for kind in kinds]
        model.key("attention.head_count_kv", np.array(counts, np.int32))
