"""chatglm and glm4: GLM-4-9B of Hugging Face's form, and GLM-4-0414, whose attention and feed-forward have norms behind
them too. Gate and up are one matrix; half of each head turns, neighbouring channels together."""

from __future__ import annotations

from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotating_channels, rotation


def build(page: Page) -> None:
    width, hidden = decoder.feed_forward_width(page), page.width
    page.usual_keys(width)
    page.rms_epsilon()
    rotation(page, rotating_channels(page, 0.5))
    decoder.ends(page)
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        decoder.norms(page, layer)
        if page.architecture == "glm4":
            page.copy(f"{place}.post_attention_norm", f"{source}.post_self_attn_layernorm", hidden)
            page.copy(f"{place}.post_ffw_norm", f"{source}.post_mlp_layernorm", hidden)
        decoder.attention(page, layer)
        page.copy(f"{place}.ffn_up", f"{source}.mlp.gate_up_proj", 2 * width, hidden)
        page.copy(f"{place}.ffn_down", f"{source}.mlp.down_proj", hidden, width)
