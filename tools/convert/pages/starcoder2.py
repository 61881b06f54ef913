"""starcoder2: norms and matrices with biases, a feed-forward network without a gate."""

from __future__ import annotations

from llamaclust.tools.convert.page import GELU, Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT, MAX_WIDTH


def build(page: Page) -> None:
    settings, hidden = page.settings, page.width
    width = settings.count("intermediate_size", maximum=MAX_WIDTH)
    page.activation(GELU, "hidden_act")
    page.usual_keys(width)
    if settings.has("sliding_window"):
        page.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
    page.norm_epsilon("norm_epsilon", "layer_norm_epsilon")
    rotation(page, page.head_width, says_dimensions=False)
    page.copy("token_embd", "model.embed_tokens", page.words, hidden)
    page.copy("output_norm", "model.norm", hidden, bias=True)
    page.output(tied=True)
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        page.copy(f"{place}.attn_norm", f"{source}.input_layernorm", hidden, bias=True)
        page.copy(f"{place}.ffn_norm", f"{source}.post_attention_layernorm", hidden, bias=True)
        decoder.attention(page, layer)
        page.copy(f"{place}.ffn_up", f"{source}.mlp.c_fc", width, hidden, bias=None)
        page.copy(f"{place}.ffn_down", f"{source}.mlp.c_proj", hidden, width, bias=None)
