"""A llama model whose words depend only on the scale of its adapter. Its logits are tangents of a parabola over the
scale: the words with the nearest scale have the largest logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from support.models.tiny_tokenizers import sentencepiece

WORDS = {"little": 0.0, "bright": 0.0, "special": 0.3, "far": 0.7, "love": 1.0}
"""The words with their scales; the first two have equal scales and alternate."""
_VOCABULARY, _WIDTH, _HEADS = 400, 64, 2
_OTHERS = -10.0
"""The logit of all other tokens."""
_TURN = 0.01
"""The logit difference by which two words of one scale alternate."""
Float32 = NDArray[np.float32]


def build_scale_words(model: Path, adapter: Path) -> None:
    """Writes the model and the adapter."""
    tokens = sentencepiece(_VOCABULARY)
    words = tokens["tokenizer.ggml.tokens"]
    assert isinstance(words, list)
    words[-len(WORDS) :] = [f"▁{word}" for word in WORDS]
    write_gguf(model, {**_METADATA, **tokens}, [_source(name, weights) for name, weights in _weights().items()])
    halves = {"a": _one((1, _WIDTH), 0, 0), "b": _one((_WIDTH, 1), 2, 0)}  # channel 2 of the hidden state is the scale
    sources = [_source(f"blk.0.attn_output.weight.lora_{half}", weights) for half, weights in halves.items()]
    lora: dict[str, WritableValue] = {"adapter.type": "lora", "adapter.lora.alpha": np.float32(1)}
    write_gguf(adapter, {"general.architecture": "llama", "general.type": "adapter", **lora}, sources)


_METADATA: dict[str, WritableValue] = {
    "general.architecture": "llama",
    "general.type": "model",
    "llama.block_count": 1,
    "llama.context_length": 2048,
    "llama.embedding_length": _WIDTH,
    "llama.feed_forward_length": _WIDTH,
    "llama.attention.head_count": _HEADS,
    "llama.attention.head_count_kv": _HEADS,
    "llama.attention.layer_norm_rms_epsilon": np.float32(1e-6),
    "llama.rope.dimension_count": _WIDTH // _HEADS,
    "llama.vocab_size": _VOCABULARY,
}


def _weights() -> dict[str, Float32]:
    """Returns weights: hidden states have 1 in channel 0 and 1 or -1 in channel 1; attention writes 1 for the
    adapter."""
    first = _VOCABULARY - len(WORDS)
    embedding, output = np.zeros((2, _VOCABULARY, _WIDTH), np.float32)
    embedding[:, :2] = 1
    embedding[first, 1] = -1
    output[:, 0] = _OTHERS
    for row, scale in enumerate(WORDS.values(), first):
        output[row, :3] = -(scale**2), 0, 2 * scale
    output[first : first + 2, 1] = _TURN, -_TURN
    norms = {
        f"{name}.weight": np.ones(_WIDTH, np.float32) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")
    }
    square = (_WIDTH, _WIDTH)
    parts = ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    zeros = {f"blk.0.{part}.weight": np.zeros(square, np.float32) for part in parts}
    values = _one(square, 0, 0) * np.float32((2 / _WIDTH) ** 0.5)  # the norm's divisor
    return {
        "token_embd.weight": embedding,
        "output.weight": output,
        "blk.0.attn_v.weight": values,
        **norms,
        **zeros,
    }


def _one(shape: tuple[int, int], row: int, column: int) -> Float32:
    """Returns zeros except for a single 1."""
    weights = np.zeros(shape, np.float32)
    weights[row, column] = 1
    return weights


def _source(name: str, weights: Float32) -> TensorSource:
    return TensorSource(name, QuantType.F32, weights.shape, lambda: weights.tobytes())
