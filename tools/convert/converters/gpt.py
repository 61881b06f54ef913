"""GPT-2 and StarCoder 2: norms and matrices have biases, and the feed-forward network has no gate."""

from __future__ import annotations

from llamaclust.tools.convert.lazy import Recent, transposed
from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT


def build_gpt2(page: Page) -> None:
    """Converts GPT-2, which has a table of positions and stores its matrices transposed."""
    settings, width = page.settings, page.width
    context = settings.count("n_ctx", "n_positions", maximum=1 << 20)
    if settings.flag("scale_attn_by_inverse_layer_idx") or not settings.flag("scale_attn_weights", default=True):
        raise settings.error("scale_attn_weights", "other scales of attention scores are not supported")
    decoder.activation(page, decoder.GELU, "activation_function")
    feed_forward = settings.count("n_inner", default=4 * width)
    page.key("block_count", page.layers)
    page.key("context_length", context)
    page.key("embedding_length", width)
    page.key("feed_forward_length", feed_forward)
    page.key("attention.head_count", page.heads)
    decoder.norm_epsilon(page, "layer_norm_epsilon")
    root = "transformer." if page.has("transformer.wte.weight") else ""
    page.copy("token_embd", f"{root}wte", page.words, width)
    page.copy("position_embd", f"{root}wpe", context, width)
    page.copy("output_norm", f"{root}ln_f", width, bias=True)
    page.output(tied=True)
    recent = Recent()
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"{root}h.{layer}"
        page.copy(f"{place}.attn_norm", f"{source}.ln_1", width, bias=True)
        page.copy(f"{place}.ffn_norm", f"{source}.ln_2", width, bias=True)
        for name, inner, rows, columns in (
            ("attn_qkv", "attn.c_attn", width, 3 * width),
            ("attn_output", "attn.c_proj", width, width),
            ("ffn_up", "mlp.c_fc", width, feed_forward),
            ("ffn_down", "mlp.c_proj", feed_forward, width),
        ):
            weight = page.take(f"{source}.{inner}.weight", rows, columns)
            page.put(f"{place}.{name}.weight", transposed(weight, recent))
            page.put(f"{place}.{name}.bias", page.take(f"{source}.{inner}.bias", columns))


def build_starcoder2(page: Page) -> None:
    settings, hidden = page.settings, page.width
    width = settings.count("intermediate_size")
    decoder.activation(page, decoder.GELU, "hidden_act")
    decoder.usual_keys(page, width)
    if settings.has("sliding_window"):
        page.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
    decoder.norm_epsilon(page, "norm_epsilon", "layer_norm_epsilon")
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
