"""LLaMA and models with its layers: llama, smollm3, mistral3, internlm2, baichuan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.tools.convert.lazy import mapped, rows
from llamaclust.tools.convert.page import Page, neighbours, picked
from llamaclust.tools.convert.pages import decoder
from llamaclust.tools.convert.rotation import position_scale, rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT, MAX_LAYERS

_MIXTRAL = ("w1", "w3", "w2")
_SMOLLM3_PERIOD = 4
_BAICHUAN_2_WORDS = 125696
"""The vocabulary size of Baichuan 2, whose output matrix has rows normalized to length 1."""


def build(page: Page) -> None:
    """Converts LLaMA in Hugging Face's format, and models with the same layers, such as Mistral, Mixtral and Yi."""
    width = decoder.feed_forward_width(page)
    count = page.settings.count("num_local_experts", default=0, minimum=0, maximum=1 << 10)
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page, default=1e-6)
    rotation(page, page.head_width)
    if page.settings.has("sliding_window"):
        page.key("attention.sliding_window", page.settings.count("sliding_window", maximum=MAX_CONTEXT))
    if count:
        page.key("expert_count", count)
        page.key("expert_used_count", page.settings.count("num_experts_per_tok", maximum=count))
    decoder.ends(page)
    for layer in range(page.layers):
        decoder.norms(page, layer)
        decoder.attention(page, layer)
        if count:
            prefix = f"model.layers.{layer}.block_sparse_moe"
            page.copy(f"blk.{layer}.ffn_gate_inp", f"{prefix}.gate", count, page.width)
            decoder.experts(page, f"blk.{layer}", count, width, _MIXTRAL, f"{prefix}.experts")
        else:
            decoder.feed_forward(page, layer, width)


def build_smollm3(page: Page) -> None:
    """Converts SmolLM 3, in which every fourth layer has no RoPE."""
    settings = page.settings
    if settings.flag("use_sliding_window"):
        raise settings.error("use_sliding_window", "true is not supported")
    period = settings.count("no_rope_layer_interval", default=_SMOLLM3_PERIOD, maximum=MAX_LAYERS)
    rotated = [int((layer + 1) % period != 0) for layer in range(page.layers)]
    if settings.has("no_rope_layers"):
        rotated = settings.values["no_rope_layers"]
    if rotated != [int((layer + 1) % _SMOLLM3_PERIOD != 0) for layer in range(page.layers)]:
        name = "no_rope_layers" if settings.has("no_rope_layers") else "no_rope_layer_interval"
        raise settings.error(name, f"smollm3 omits the rotation in every {_SMOLLM3_PERIOD}th layer, and only there")
    width = decoder.feed_forward_width(page)
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page, default=1e-6)
    rotation(page, page.head_width, base=2e6)
    _layers(page, width)


def build_mistral3(page: Page) -> None:
    """Converts Mistral Small 3.1 and Ministral 3."""
    settings, width = page.settings, decoder.feed_forward_width(page)
    decoder.usual_keys(page, width)
    context = settings.count("max_position_embeddings", maximum=MAX_CONTEXT)
    if settings.count("sliding_window", default=context, maximum=MAX_CONTEXT) < context:
        what = f"{settings.shown('sliding_window')} for a context of {context}: mistral3 has no window"
        raise settings.error("sliding_window", what)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page, default=1e-5)
    rotation(page, page.head_width, log_multiplier=True)
    position_scale(page)
    _layers(page, width)


def _layers(page: Page, width: int) -> None:
    decoder.ends(page)
    for layer in range(page.layers):
        decoder.norms(page, layer)
        decoder.attention(page, layer)
        decoder.feed_forward(page, layer, width)


def build_meta(page: Page) -> None:
    """Converts LLaMA with Meta's tensor names, also from llama2.c and TencentPretrain files."""
    width, hidden = decoder.feed_forward_width(page), page.width
    decoder.usual_keys(page, width)
    page.key("vocab_size", page.words)
    decoder.rms_epsilon(page)
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
        _meta_feed_forward(page, place, source, width)


def _meta_feed_forward(page: Page, place: str, source: str, width: int) -> None:
    page.copy(f"{place}.ffn_gate", f"{source}.feed_forward.w1", width, page.width)
    page.copy(f"{place}.ffn_down", f"{source}.feed_forward.w2", page.width, width)
    page.copy(f"{place}.ffn_up", f"{source}.feed_forward.w3", width, page.width)


def build_internlm2(page: Page) -> None:
    width, hidden = decoder.feed_forward_width(page), page.width
    decoder.usual_keys(page, width)
    decoder.rms_epsilon(page)
    rotation(page, page.head_width)
    page.copy("token_embd", "model.tok_embeddings", page.words, hidden)
    page.copy("output_norm", "model.norm", hidden)
    page.output("output")
    for layer in range(page.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        page.copy(f"{place}.attn_norm", f"{source}.attention_norm", hidden)
        page.copy(f"{place}.ffn_norm", f"{source}.ffn_norm", hidden)
        _internlm2_attention(page, place, f"{source}.attention")
        page.copy(f"{place}.attn_output", f"{source}.attention.wo", hidden, page.heads * page.head_width)
        _meta_feed_forward(page, place, source, width)


def _internlm2_attention(page: Page, place: str, source: str) -> None:
    """Splits a matrix whose rows form groups of several query heads, a key head and a value head."""
    head, shared = page.head_width, page.heads // page.kv_heads
    group = (shared + 2) * head
    packed = page.take(f"{source}.wqkv.weight", page.kv_heads * group, page.width)
    starts = range(0, page.kv_heads * group, group)
    query = picked(packed, [range(at, at + shared * head) for at in starts])
    key = picked(packed, [range(at + shared * head, at + (shared + 1) * head) for at in starts])
    page.put(f"{place}.attn_q.weight", neighbours(query, page.heads))
    page.put(f"{place}.attn_k.weight", neighbours(key, page.kv_heads))
    page.put(f"{place}.attn_v.weight", picked(packed, [range(at + group - head, at + group) for at in starts]))


def build_baichuan(page: Page) -> None:
    width = decoder.feed_forward_width(page)
    decoder.usual_keys(page, width)
    decoder.rms_epsilon(page)
    rotation(page, page.head_width)
    page.metadata["baichuan.tensor_data_layout"] = "Meta AI original pth"
    decoder.ends(page)
    if page.words == _BAICHUAN_2_WORDS:
        page.tensors["output.weight"] = mapped(page.tensors["output.weight"], _of_length_one)
    for layer in range(page.layers):
        decoder.norms(page, layer)
        _baichuan_attention(page, layer)
        decoder.feed_forward(page, layer, width)


def _baichuan_attention(page: Page, layer: int) -> None:
    place, source, width = f"blk.{layer}", f"model.layers.{layer}.self_attn", page.width
    packed = page.take(f"{source}.W_pack.weight", 3 * width, width)
    for number, part in enumerate(("q", "k", "v")):
        found = rows(packed, number * width, (number + 1) * width)
        page.put(f"{place}.attn_{part}.weight", found if part == "v" else neighbours(found, page.heads))
    page.copy(f"{place}.attn_output", f"{source}.o_proj", width, width)


def _of_length_one(values: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.sqrt(np.square(values, dtype=np.float64).sum(1, keepdims=True))
    result: NDArray[np.float32] = (values / np.maximum(lengths, 1e-7)).astype(np.float32)
    return result
