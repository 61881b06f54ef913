"""ChatGLM 2 and 3, GLM-4-9B (in its authors' format and in Hugging Face's) and GLM-4-0414. Gate and up are one matrix.
RoPE rotates half of each head, in pairs of neighbouring channels."""

from __future__ import annotations

from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.rotation import rotating_channels, rotation


def build(model: ConvertedModel) -> None:
    """Converts GLM checkpoints in Hugging Face's format."""
    width, hidden = decoder.feed_forward_width(model), model.width
    decoder.usual_keys(model, width)
    decoder.rms_epsilon(model)
    rotation(model, rotating_channels(model, 0.5))
    decoder.ends(model)
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        decoder.norms(model, layer)
        if model.architecture == "glm4":
            model.copy(f"{place}.post_attention_norm", f"{source}.post_self_attn_layernorm", hidden)
            model.copy(f"{place}.post_ffw_norm", f"{source}.post_mlp_layernorm", hidden)
        decoder.attention(model, layer)
        model.copy(f"{place}.ffn_up", f"{source}.mlp.gate_up_proj", 2 * width, hidden)
        model.copy(f"{place}.ffn_down", f"{source}.mlp.down_proj", hidden, width)


def build_chatglm(model: ConvertedModel) -> None:
    settings, width = model.settings, model.width
    feed_forward = settings.count("ffn_hidden_size")
    head = settings.count("kv_channels", default=max(1, width // model.heads), maximum=1 << 12)
    kv_heads = model.heads
    if settings.flag("multi_query_attention"):
        kv_heads = settings.count("multi_query_group_num", maximum=model.heads)
    if not settings.flag("rmsnorm", default=True) or settings.flag("apply_residual_connection_post_layernorm"):
        raise settings.error("rmsnorm", "expected true, and false for apply_residual_connection_post_layernorm")
    decoder.usual_keys(model, feed_forward)
    model.key("attention.head_count_kv", kv_heads)
    decoder.rms_epsilon(model, "layernorm_epsilon")
    model.key("rope.dimension_count", head // 2)
    model.key("rope.freq_base", 10000.0 * settings.real("rope_ratio", default=1.0, minimum=1e-3))
    model.copy("token_embd", "transformer.embedding.word_embeddings", model.words, width)
    model.copy("output_norm", "transformer.encoder.final_layernorm", width)
    model.output("transformer.output_layer")
    packed = (model.heads + 2 * kv_heads) * head
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"transformer.encoder.layers.{layer}"
        model.copy(f"{place}.attn_norm", f"{source}.input_layernorm", width)
        model.copy(f"{place}.attn_qkv", f"{source}.self_attention.query_key_value", packed, width, bias=None)
        model.copy(f"{place}.attn_output", f"{source}.self_attention.dense", width, model.heads * head, bias=None)
        model.copy(f"{place}.ffn_norm", f"{source}.post_attention_layernorm", width)
        model.copy(f"{place}.ffn_up", f"{source}.mlp.dense_h_to_4h", 2 * feed_forward, width, bias=None)
        model.copy(f"{place}.ffn_down", f"{source}.mlp.dense_4h_to_h", width, feed_forward, bias=None)
