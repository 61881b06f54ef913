"""ChatGLM 2 and 3, GLM-4-9B (in its authors' format and in Hugging Face's) and GLM-4-0414. Gate and up are one matrix.
RoPE rotates half of each head, in pairs of neighbouring channels."""

from __future__ import annotations

from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotating_channels, rotation


def build(page: Page) -> None:
    """Converts GLM checkpoints in Hugging Face's format."""
    width, hidden = decoder.feed_forward_width(page), page.width
    decoder.usual_keys(page, width)
    decoder.rms_epsilon(page)
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


def build_chatglm(page: Page) -> None:
    settings, width = page.settings, page.width
    feed_forward = settings.count("ffn_hidden_size")
    head = settings.count("kv_channels", default=max(1, width // page.heads), maximum=1 << 12)
    kv_heads = page.heads
    if settings.flag("multi_query_attention"):
        kv_heads = settings.count("multi_query_group_num", maximum=page.heads)
    if not settings.flag("rmsnorm", default=True) or settings.flag("apply_residual_connection_post_layernorm"):
        raise settings.error("rmsnorm", "a model with other norms is not supported")
    decoder.usual_keys(page, feed_forward)
    page.key("attention.head_count_kv", kv_heads)
    decoder.rms_epsilon(page, "layernorm_epsilon")
    page.key("rope.dimension_count", head // 2)
    page.key("rope.freq_base", 10000.0 * settings.real("rope_ratio", default=1.0, minimum=1e-3))
    page.copy("token_embd", "transformer.embedding.word_embeddings", page.words, width)
    page.copy("output_norm", "transformer.encoder.final_layernorm", width)
    page.output("transformer.output_layer")
    packed = (page.heads + 2 * kv_heads) * head
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"transformer.encoder.layers.{layer}"
        page.copy(f"{place}.attn_norm", f"{source}.input_layernorm", width)
        page.copy(f"{place}.attn_qkv", f"{source}.self_attention.query_key_value", packed, width, bias=None)
        page.copy(f"{place}.attn_output", f"{source}.self_attention.dense", width, page.heads * head, bias=None)
        page.copy(f"{place}.ffn_norm", f"{source}.post_attention_layernorm", width)
        page.copy(f"{place}.ffn_up", f"{source}.mlp.dense_h_to_4h", 2 * feed_forward, width, bias=None)
        page.copy(f"{place}.ffn_down", f"{source}.mlp.dense_4h_to_h", width, feed_forward, bias=None)
