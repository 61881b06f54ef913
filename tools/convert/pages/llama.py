"""llama: LLaMA of Hugging Face's form and what has its layers: Mistral, Mixtral, Yi, SmolLM, DeepSeek LLM."""

from __future__ import annotations

from llamaclust.tools.convert.page import Page
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT

_MIXTRAL = ("w1", "w3", "w2")


def build(page: Page) -> None:
    width = decoder.feed_forward_width(page)
    count = page.settings.count("num_local_experts", default=0, minimum=0, maximum=1 << 10)
    page.usual_keys(width)
    page.key("vocab_size", page.words)
    page.rms_epsilon(default=1e-6)
    rotation(page, page.head_width)
    if page.settings.has("sliding_window"):
        page.key("attention.sliding_window", page.settings.count("sliding_window", maximum=MAX_CONTEXT))
    if count:
        page.key("expert_count", count)
        page.key("expert_used_count", page.settings.count("num_experts_per_tok", maximum=count))
    decoder.ends(page)
    for layer in range(page.layers):
        decoder.norms(page, layer)
        decoder.attention(page, layer, pairs=True)
        if count:
            prefix = f"model.layers.{layer}.block_sparse_moe"
            page.copy(f"blk.{layer}.ffn_gate_inp", f"{prefix}.gate", count, page.width)
            decoder.experts(page, layer, count, width, _MIXTRAL, f"{prefix}.experts")
        else:
            decoder.feed_forward(page, layer, width)
