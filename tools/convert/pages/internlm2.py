"""internlm2: InternLM 2 and 2.5, whose Q, K and V are one matrix by groups of heads that share K and V."""

from __future__ import annotations

from llamaclust.tools.convert.page import Page, neighbours, picked
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotation


def build(page: Page) -> None:
    width, hidden = decoder.feed_forward_width(page), page.width
    page.usual_keys(width)
    page.rms_epsilon()
    rotation(page, page.head_width)
    page.copy("token_embd", "model.tok_embeddings", page.words, hidden)
    page.copy("output_norm", "model.norm", hidden)
    page.output("output")
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        page.copy(f"{place}.attn_norm", f"{source}.attention_norm", hidden)
        page.copy(f"{place}.ffn_norm", f"{source}.ffn_norm", hidden)
        _attention(page, place, f"{source}.attention")
        page.copy(f"{place}.attn_output", f"{source}.attention.wo", hidden, page.heads * page.head_width)
        page.copy(f"{place}.ffn_gate", f"{source}.feed_forward.w1", width, hidden)
        page.copy(f"{place}.ffn_down", f"{source}.feed_forward.w2", hidden, width)
        page.copy(f"{place}.ffn_up", f"{source}.feed_forward.w3", width, hidden)


def _attention(page: Page, place: str, source: str) -> None:
    """A group: the query heads, one of keys, one of values."""
    head, shared = page.head_width, page.heads // page.kv_heads
    group = (shared + 2) * head
    packed = page.take(f"{source}.wqkv.weight", page.kv_heads * group, page.width)
    starts = range(0, page.kv_heads * group, group)
    query = picked(packed, [range(at, at + shared * head) for at in starts])
    key = picked(packed, [range(at + shared * head, at + (shared + 1) * head) for at in starts])
    page.put(f"{place}.attn_q.weight", neighbours(query, page.heads))
    page.put(f"{place}.attn_k.weight", neighbours(key, page.kv_heads))
    page.put(f"{place}.attn_v.weight", picked(packed, [range(at + group - head, at + group) for at in starts]))
