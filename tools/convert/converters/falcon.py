"""Falcon 7B and 40B. Q, K and V are one matrix, ordered by groups of heads that share K and V."""

from __future__ import annotations

from llamaclust.tools.convert.page import Page, picked
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotation


def build(page: Page) -> None:
    settings, width = page.settings, page.width
    if settings.flag("alibi"):
        raise settings.error("alibi", "true is not supported")
    kv_heads = _kv_heads(page)
    feed_forward = settings.count("ffn_hidden_size", default=4 * width)
    decoder.activation(page, decoder.GELU[::-1], "activation")
    page.key("block_count", page.layers)
    page.key("context_length", settings.count("max_position_embeddings", default=2048, maximum=1 << 30))
    page.key("tensor_data_layout", "jploski")
    page.key("embedding_length", width)
    page.key("feed_forward_length", feed_forward)
    page.key("attention.head_count", page.heads)
    page.key("attention.head_count_kv", kv_heads)
    decoder.norm_epsilon(page, "layer_norm_epsilon")
    rotation(page, page.head_width, says_dimensions=False)
    page.copy("token_embd", "transformer.word_embeddings", page.words, width)
    page.copy("output_norm", "transformer.ln_f", width, bias=True)
    page.output(tied=not page.has("lm_head.weight"))
    for layer in range(page.layers):
        _layer(page, f"blk.{layer}", f"transformer.h.{layer}", kv_heads, feed_forward)


def _kv_heads(page: Page) -> int:
    settings = page.settings
    large = settings.flag("new_decoder_architecture", default=settings.has("n_head_kv"))
    if not large and not settings.flag("parallel_attn", default=True):
        raise settings.error("parallel_attn", "false is not supported")
    if not large and settings.flag("multi_query", default=True):
        return 1
    return settings.count("num_kv_heads", "n_head_kv", default=page.heads, maximum=page.heads)


def _layer(page: Page, place: str, source: str, kv_heads: int, feed_forward: int) -> None:
    width, attention = page.width, f"{source}.self_attention"
    if page.has(f"{source}.ln_attn.weight"):
        # GGUF calls the norm of the feed-forward network `attn_norm`.
        page.copy(f"{place}.attn_norm", f"{source}.ln_mlp", width, bias=True)
        page.copy(f"{place}.attn_norm_2", f"{source}.ln_attn", width, bias=True)
    else:
        page.copy(f"{place}.attn_norm", f"{source}.input_layernorm", width, bias=True)
    head, shared = page.head_width, page.heads // kv_heads
    group = (shared + 2) * head
    packed = page.take(f"{attention}.query_key_value.weight", kv_heads * group, width)
    starts = range(0, kv_heads * group, group)
    query = [range(at, at + shared * head) for at in starts]
    key = [range(at + shared * head, at + (shared + 1) * head) for at in starts]
    value = [range(at + (shared + 1) * head, at + group) for at in starts]
    page.put(f"{place}.attn_qkv.weight", picked(packed, [*query, *key, *value]))
    page.copy(f"{place}.attn_output", f"{attention}.dense", width, width)
    page.copy(f"{place}.ffn_up", f"{source}.mlp.dense_h_to_4h", feed_forward, width)
    page.copy(f"{place}.ffn_down", f"{source}.mlp.dense_4h_to_h", width, feed_forward)
