"""llama as Meta names it, which files of llama2.c and TencentPretrain are brought to; Q and K need no change."""

from __future__ import annotations

from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages.decoder import feed_forward_width
from llamaclust.tools.convert.rotation import rotation


def build(page: Page) -> None:
    width, hidden = feed_forward_width(page), page.width
    page.usual_keys(width)
    page.key("vocab_size", page.words)
    page.rms_epsilon()
    rotation(page, page.head_width)
    page.copy("token_embd", "tok_embeddings", page.words, hidden)
    page.copy("output_norm", "norm", hidden)
    page.output("output")
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"layers.{layer}"
        query, key = page.heads * page.head_width, page.kv_heads * page.head_width
        page.copy(f"{place}.attn_norm", f"{source}.attention_norm", hidden)
        page.copy(f"{place}.ffn_norm", f"{source}.ffn_norm", hidden)
        page.copy(f"{place}.attn_q", f"{source}.attention.wq", query, hidden)
        page.copy(f"{place}.attn_k", f"{source}.attention.wk", key, hidden)
        page.copy(f"{place}.attn_v", f"{source}.attention.wv", key, hidden)
        page.copy(f"{place}.attn_output", f"{source}.attention.wo", hidden, query)
        page.copy(f"{place}.ffn_gate", f"{source}.feed_forward.w1", width, hidden)
        page.copy(f"{place}.ffn_down", f"{source}.feed_forward.w2", hidden, width)
        page.copy(f"{place}.ffn_up", f"{source}.feed_forward.w3", width, hidden)
