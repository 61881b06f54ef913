"""gpt-oss. Experts are float matrices or MXFP4 blocks, which are copied without loss. Rows of gate and up alternate."""

from __future__ import annotations

import numpy as np

from llamaclust.model.quant_types import QuantType
from llamaclust.tools.convert.converted_model import ConvertedModel
from llamaclust.tools.convert.converters import decoder
from llamaclust.tools.convert.lazy import Array, Lazy, exchanged, strided
from llamaclust.tools.convert.rotation import rotation
from llamaclust.tools.convert.settings import MAX_CONTEXT

_PERIOD = 2
_MAX_EXPERTS = 1 << 10
_CLAMP, _GAIN = 7.0, 1.702
_BLOCK = 32


def build(model: ConvertedModel) -> None:
    settings, hidden = model.settings, model.width
    width = decoder.feed_forward_width(model)
    for name, usual in (("swiglu_limit", _CLAMP), ("swiglu_alpha", _GAIN)):
        if settings.real(name, default=usual) != usual:
            raise settings.error(name, f"{settings.shown(name)} is not supported; gpt-oss computes with {usual}")
    decoder.usual_keys(model, width)
    decoder.rms_epsilon(model, default=1e-5)
    rotation(model, model.head_width, base=150000.0, says_dimensions=False)
    model.key("attention.sliding_window", settings.count("sliding_window", maximum=MAX_CONTEXT))
    windowed = decoder.windowed_layers(model, _PERIOD)
    if windowed != [(layer + 1) % _PERIOD != 0 for layer in range(model.layers)]:
        model.key("attention.sliding_window_pattern", np.array(windowed, np.bool_))
    count = settings.count("num_local_experts", "num_experts", maximum=_MAX_EXPERTS)
    model.key("expert_count", count)
    model.key("expert_used_count", settings.count("num_experts_per_tok", "experts_per_token", maximum=count))
    model.key("expert_feed_forward_length", width)
    decoder.ends(model)
    for layer in range(model.layers):
        place, source = f"blk.{layer}", f"model.layers.{layer}"
        model.copy(f"{place}.attn_norm", f"{source}.input_layernorm", hidden)
        model.copy(f"{place}.post_attention_norm", f"{source}.post_attention_layernorm", hidden)
        decoder.attention(model, layer, bias=True)
        model.put(f"{place}.attn_sinks.weight", model.take(f"{source}.self_attn.sinks", model.heads))
        model.copy(f"{place}.ffn_gate_inp", f"{source}.mlp.router", count, hidden, bias=True)
        _experts(model, layer, count, width)


def _experts(model: ConvertedModel, layer: int, count: int, width: int) -> None:
    source, hidden = f"model.layers.{layer}.mlp.experts", model.width
    halves = _matrices(model, f"{source}.gate_up_proj", (count, 2 * width, hidden), 2)
    bias = model.take(f"{source}.gate_up_proj_bias", count, 2 * width)
    for first, (part, weight) in enumerate(zip(("gate", "up"), halves, strict=True)):
        model.put(f"blk.{layer}.ffn_{part}_exps.weight", weight)
        model.put(f"blk.{layer}.ffn_{part}_exps.bias", strided(bias, 1, first, 2))
    (down,) = _matrices(model, f"{source}.down_proj", (count, hidden, width), 1)
    model.put(f"blk.{layer}.ffn_down_exps.weight", down)
    model.put(f"blk.{layer}.ffn_down_exps.bias", model.take(f"{source}.down_proj_bias", count, hidden))


def _matrices(model: ConvertedModel, source: str, shape: tuple[int, int, int], parts: int) -> list[Lazy]:
    """Returns `parts` tensors. Tensor i has rows i, i + parts, i + 2 * parts, ... of each expert's matrix."""
    count, rows, columns = shape
    if not model.has(f"{source}_blocks"):
        whole = exchanged(model.take(source, count, columns, rows))
        return [strided(whole, 1, first, parts) for first in range(parts)]
    if columns % _BLOCK:
        name = "hidden_size" if columns == model.width else "intermediate_size"
        raise model.settings.error(name, f"expected a multiple of {_BLOCK}, found {columns}")
    blocks = model.take_bytes(f"{source}_blocks", count, rows, columns // _BLOCK, _BLOCK // 2)
    scales = model.take_bytes(f"{source}_scales", count, rows, columns // _BLOCK)
    return [packed_blocks(strided(blocks, 1, first, parts), strided(scales, 1, first, parts)) for first in range(parts)]


def packed_blocks(blocks: Lazy, scales: Lazy) -> Lazy:
    """Packs `blocks` [experts, rows, blocks per row, 16 bytes] and their `scales` as GGUF's MXFP4."""
    count, rows, width, _ = blocks.shape

    def read(start: int, end: int) -> Array:
        pairs = blocks.read(start, end)
        first, second = pairs[..., : _BLOCK // 4], pairs[..., _BLOCK // 4 :]
        found = np.empty((*pairs.shape[:-1], 1 + _BLOCK // 2), np.uint8)
        found[..., 0] = scales.read(start, end)
        # Byte i has numbers 2 i and 2 i + 1 in the checkpoint, but numbers i (low half) and i + 16 (high half) in GGUF.
        found[..., 1::2] = first & 15 | second << 4
        found[..., 2::2] = first >> 4 | second & 240
        return found.reshape(*pairs.shape[:2], -1)

    return Lazy((count, rows, width * _BLOCK), blocks.storage, read, blocks.origin, QuantType.MXFP4)
