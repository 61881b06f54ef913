"""LLaMA and models with its layers: llama, smollm3, mistral3, internlm2, baichuan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ModelFileError
from llamaclust.tools.convert.converted_model import ConvertedModel, neighbours, picked
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.lazy import mapped, rows
from llamaclust.tools.convert.rotation import position_scale, rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT, MAX_LAYERS

_MIXTRAL = ("w1", "w3", "w2")
_SMOLLM3_PERIOD = 4
_BAICHUAN_2_WORDS = 125696
"""The vocabulary size of Baichuan 2, whose output matrix has rows normalized to length 1."""


def build(model: ConvertedModel) -> None:
    """Converts LLaMA in Hugging Face's format, and models with the same layers, such as Mistral, Mixtral and Yi."""
    width = decoder.feed_forward_width(model)
    count = model.settings.count("num_local_experts", default=0, minimum=0, maximum=1 << 10)
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model, default=1e-6)
    rotation(model, model.head_width)
    if model.settings.has("sliding_window"):
        model.key("attention.sliding_window", model.settings.count("sliding_window", maximum=MAX_CONTEXT))
    if count:
        model.key("expert_count", count)
        model.key("expert_used_count", model.settings.count("num_experts_per_tok", maximum=count))
    decoder.ends(model)
    for layer in range(model.layers):
        decoder.norms(model, layer)
        decoder.attention(model, layer)
        if count:
            prefix = f"model.layers.{layer}.block_sparse_moe"
            model.copy(f"blk.{layer}.ffn_gate_inp", f"{prefix}.gate", count, model.width)
            decoder.experts(model, f"blk.{layer}", count, width, _MIXTRAL, f"{prefix}.experts")
        else:
            decoder.feed_forward(model, layer, width)


def build_smollm3(model: ConvertedModel) -> None:
    """Converts SmolLM 3, in which every fourth layer has no RoPE."""
    settings = model.settings
    if settings.flag("use_sliding_window"):
        raise settings.error("use_sliding_window", "true is not supported")
    period = settings.count("no_rope_layer_interval", default=_SMOLLM3_PERIOD, maximum=MAX_LAYERS)
    rotated = [int((layer + 1) % period != 0) for layer in range(model.layers)]
    if settings.has("no_rope_layers"):
        rotated = settings.values["no_rope_layers"]
    if rotated != [int((layer + 1) % _SMOLLM3_PERIOD != 0) for layer in range(model.layers)]:
        name = "no_rope_layers" if settings.has("no_rope_layers") else "no_rope_layer_interval"
        raise settings.error(name, f"expected RoPE in all layers except every {_SMOLLM3_PERIOD}th")
    width = decoder.feed_forward_width(model)
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model, default=1e-6)
    rotation(model, model.head_width, base=2e6)
    _layers(model, width)


def build_mistral3(model: ConvertedModel) -> None:
    """Converts Mistral Small 3.1 and Ministral 3."""
    settings, width = model.settings, decoder.feed_forward_width(model)
    decoder.usual_keys(model, width)
    context = settings.count("max_position_embeddings", maximum=MAX_CONTEXT)
    if settings.count("sliding_window", default=context, maximum=MAX_CONTEXT) < context:
        what = f"{settings.shown('sliding_window')} for a context of {context}: mistral3 has no window"
        raise settings.error("sliding_window", what)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model, default=1e-5)
    rotation(model, model.head_width, log_multiplier=True)
    position_scale(model)
    _layers(model, width)


def _layers(model: ConvertedModel, width: int) -> None:
    decoder.ends(model)
    for layer in range(model.layers):
        decoder.norms(model, layer)
        decoder.attention(model, layer)
        decoder.feed_forward(model, layer, width)


def build_meta(model: ConvertedModel) -> None:
    """Converts LLaMA with Meta's tensor names, which the readers of llama2.c and TencentPretrain files use, too."""
    width, hidden = decoder.feed_forward_width(model), model.width
    decoder.usual_keys(model, width)
    model.key("vocab_size", model.words)
    decoder.rms_epsilon(model)
    rotation(model, model.head_width)
    model.copy("token_embd", "tok_embeddings", model.words, hidden)
    model.copy("output_norm", "norm", hidden)
    model.output("output")
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"layers.{layer}"
        query, key = model.heads * model.head_width, model.kv_heads * model.head_width
        model.copy(f"{place}.attn_norm", f"{source}.attention_norm", hidden)
        model.copy(f"{place}.ffn_norm", f"{source}.ffn_norm", hidden)
        model.copy(f"{place}.attn_q", f"{source}.attention.wq", query, hidden)
        model.copy(f"{place}.attn_k", f"{source}.attention.wk", key, hidden)
        model.copy(f"{place}.attn_v", f"{source}.attention.wv", key, hidden)
        model.copy(f"{place}.attn_output", f"{source}.attention.wo", hidden, query)
        _meta_feed_forward(model, place, source, width)


def _meta_feed_forward(model: ConvertedModel, place: str, source: str, width: int) -> None:
    model.copy(f"{place}.ffn_gate", f"{source}.feed_forward.w1", width, model.width)
    model.copy(f"{place}.ffn_down", f"{source}.feed_forward.w2", model.width, width)
    model.copy(f"{place}.ffn_up", f"{source}.feed_forward.w3", width, model.width)


def build_internlm2(model: ConvertedModel) -> None:
    width, hidden = decoder.feed_forward_width(model), model.width
    decoder.usual_keys(model, width)
    decoder.rms_epsilon(model)
    rotation(model, model.head_width)
    model.copy("token_embd", "model.tok_embeddings", model.words, hidden)
    model.copy("output_norm", "model.norm", hidden)
    model.output("output")
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        model.copy(f"{place}.attn_norm", f"{source}.attention_norm", hidden)
        model.copy(f"{place}.ffn_norm", f"{source}.ffn_norm", hidden)
        _internlm2_attention(model, place, f"{source}.attention")
        model.copy(f"{place}.attn_output", f"{source}.attention.wo", hidden, model.heads * model.head_width)
        _meta_feed_forward(model, place, source, width)


def _internlm2_attention(model: ConvertedModel, place: str, source: str) -> None:
    """Splits the fused QKV matrix. Its rows form groups of several query heads, one key head and one value head."""
    head, shared = model.head_width, model.heads // model.kv_heads
    group = (shared + 2) * head
    packed = model.take(f"{source}.wqkv.weight", model.kv_heads * group, model.width)
    starts = range(0, model.kv_heads * group, group)
    query = picked(packed, [range(at, at + shared * head) for at in starts])
    key = picked(packed, [range(at + shared * head, at + (shared + 1) * head) for at in starts])
    model.put(f"{place}.attn_q.weight", neighbours(query, model.heads))
    model.put(f"{place}.attn_k.weight", neighbours(key, model.kv_heads))
    model.put(f"{place}.attn_v.weight", picked(packed, [range(at + group - head, at + group) for at in starts]))


def build_baichuan(model: ConvertedModel) -> None:
    width = decoder.feed_forward_width(model)
    decoder.usual_keys(model, width)
    decoder.rms_epsilon(model)
    rotation(model, model.head_width)
    model.metadata["baichuan.tensor_data_layout"] = "Meta AI original pth"
    decoder.ends(model)
    if model.words == _BAICHUAN_2_WORDS:
        if (head := model.tensors.get("output.weight")) is None:
            raise ModelFileError("lm_head.weight is missing: Baichuan 2 cannot use the embedding in its place")
        model.tensors["output.weight"] = mapped(head, _of_length_one)
    for layer in range(model.layers):
        decoder.norms(model, layer)
        _baichuan_attention(model, layer)
        decoder.feed_forward(model, layer, width)


def _baichuan_attention(model: ConvertedModel, layer: int) -> None:
    place, source, width = f"blk.{layer}", f"model.layers.{layer}.self_attn", model.width
    packed = model.take(f"{source}.W_pack.weight", 3 * width, width)
    for number, part in enumerate(("q", "k", "v")):
        found = rows(packed, number * width, (number + 1) * width)
        model.put(f"{place}.attn_{part}.weight", found if part == "v" else neighbours(found, model.heads))
    model.copy(f"{place}.attn_output", f"{source}.o_proj", width, width)


def _of_length_one(values: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.sqrt(np.square(values, dtype=np.float64).sum(1, keepdims=True))
    result: NDArray[np.float32] = (values / np.maximum(lengths, 1e-7)).astype(np.float32)
    return result
