"""Phi-3 and Phi-4. Q, K and V are one matrix, and gate and up are another matrix."""

from __future__ import annotations

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.rotation import rotating_channels, rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT


def build(model: ConvertedModel) -> None:
    """Converts Phi-3 and Phi-4. Models without a window get 0 as `attention.sliding_window`."""
    settings, width = model.settings, decoder.feed_forward_width(model)
    decoder.usual_keys(model, width)
    decoder.rms_epsilon(model)
    rotation(model, rotating_channels(model))
    original = settings.count("original_max_position_embeddings", default=0, minimum=0, maximum=MAX_CONTEXT)
    if original:
        model.key("rope.scaling.original_context_length", original)
    window = settings.count("sliding_window", default=0, minimum=0, maximum=MAX_CONTEXT)
    model.key("attention.sliding_window", window)
    decoder.ends(model)
    packed = (model.heads + 2 * model.kv_heads) * model.head_width
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        decoder.norms(model, layer)
        model.copy(f"{place}.attn_qkv", f"{source}.self_attn.qkv_proj", packed, model.width)
        model.copy(f"{place}.attn_output", f"{source}.self_attn.o_proj", model.width, model.heads * model.head_width)
        model.copy(f"{place}.ffn_up", f"{source}.mlp.gate_up_proj", 2 * width, model.width)
        model.copy(f"{place}.ffn_down", f"{source}.mlp.down_proj", model.width, width)
