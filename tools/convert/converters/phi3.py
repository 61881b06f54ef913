"""Phi-3 and Phi-4. Q, K and V are one matrix, and gate and up are another matrix."""

from __future__ import annotations

from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotating_channels, rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT


def build(page: Page) -> None:
    """Converts Phi-3 and Phi-4. Models without a window get 0 as `attention.sliding_window`."""
    settings, width = page.settings, decoder.feed_forward_width(page)
    decoder.usual_keys(page, width)
    decoder.rms_epsilon(page)
    rotation(page, rotating_channels(page))
    original = settings.count("original_max_position_embeddings", default=0, minimum=0, maximum=MAX_CONTEXT)
    if original:
        page.key("rope.scaling.original_context_length", original)
    window = settings.count("sliding_window", default=0, minimum=0, maximum=MAX_CONTEXT)
    page.key("attention.sliding_window", window)
    decoder.ends(page)
    packed = (page.heads + 2 * page.kv_heads) * page.head_width
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        decoder.norms(page, layer)
        page.copy(f"{place}.attn_qkv", f"{source}.self_attn.qkv_proj", packed, page.width)
        page.copy(f"{place}.attn_output", f"{source}.self_attn.o_proj", page.width, page.heads * page.head_width)
        page.copy(f"{place}.ffn_up", f"{source}.mlp.gate_up_proj", 2 * width, page.width)
        page.copy(f"{place}.ffn_down", f"{source}.mlp.down_proj", page.width, width)
