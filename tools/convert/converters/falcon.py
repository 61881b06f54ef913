"""Falcon 7B and 40B. Q, K and V are one matrix, ordered by groups of heads that share K and V."""

from __future__ import annotations

from llamaclust.tools.convert.converted_model import ConvertedModel, picked
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.rotation import rotation


def build(model: ConvertedModel) -> None:
    settings, width = model.settings, model.width
    if settings.flag("alibi"):
        raise settings.error("alibi", "true is not supported")
    kv_heads = _kv_heads(model)
    feed_forward = settings.count("ffn_hidden_size", default=4 * width)
    decoder.activation(model, decoder.GELU[::-1], "activation")
    model.key("block_count", model.layers)
    model.key("context_length", settings.count("max_position_embeddings", default=2048, maximum=1 << 30))
    model.key("tensor_data_layout", "jploski")
    model.key("embedding_length", width)
    model.key("feed_forward_length", feed_forward)
    model.key("attention.head_count", model.heads)
    model.key("attention.head_count_kv", kv_heads)
    decoder.norm_epsilon(model, "layer_norm_epsilon")
    rotation(model, model.head_width, says_dimensions=False)
    model.copy("token_embd", "transformer.word_embeddings", model.words, width)
    model.copy("output_norm", "transformer.ln_f", width, bias=True)
    model.output(tied=not model.has("lm_head.weight"))
    for layer in range(model.layers):
        _layer(model, f"blk.{layer}", f"transformer.h.{layer}", kv_heads, feed_forward)


def _kv_heads(model: ConvertedModel) -> int:
    settings = model.settings
    large = settings.flag("new_decoder_architecture", default=settings.has("n_head_kv"))
    if not large and not settings.flag("parallel_attn", default=True):
        raise settings.error("parallel_attn", "false is not supported")
    if not large and settings.flag("multi_query", default=True):
        return 1
    return settings.count("num_kv_heads", "n_head_kv", default=model.heads, maximum=model.heads)


def _layer(model: ConvertedModel, place: str, source: str, kv_heads: int, feed_forward: int) -> None:
    width, attention = model.width, f"{source}.self_attention"
    if model.has(f"{source}.ln_attn.weight"):
        # GGUF calls the norm of the feed-forward network `attn_norm`.
        model.copy(f"{place}.attn_norm", f"{source}.ln_mlp", width, bias=True)
        model.copy(f"{place}.attn_norm_2", f"{source}.ln_attn", width, bias=True)
    else:
        model.copy(f"{place}.attn_norm", f"{source}.input_layernorm", width, bias=True)
    head, shared = model.head_width, model.heads // kv_heads
    group = (shared + 2) * head
    packed = model.take(f"{attention}.query_key_value.weight", kv_heads * group, width)
    starts = range(0, kv_heads * group, group)
    query = [range(at, at + shared * head) for at in starts]
    key = [range(at + shared * head, at + (shared + 1) * head) for at in starts]
    value = [range(at + (shared + 1) * head, at + group) for at in starts]
    model.put(f"{place}.attn_qkv.weight", picked(packed, [*query, *key, *value]))
    model.copy(f"{place}.attn_output", f"{attention}.dense", width, width)
    model.copy(f"{place}.ffn_up", f"{source}.mlp.dense_h_to_4h", feed_forward, width)
    model.copy(f"{place}.ffn_down", f"{source}.mlp.dense_4h_to_h", width, feed_forward)
