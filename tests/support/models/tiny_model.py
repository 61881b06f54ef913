"""Builds small random models with plausible values: logits that spread, norms near 1, a tokenizer for any text."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.kernels.packed.weights import SUPPORTED_TYPES
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from support.models.tiny_quantizers import quantize
from support.models.tiny_tokenizers import byte_level, sentencepiece

_WITH_BIASES = ("qwen2", "qwen2vl")


@dataclass(frozen=True, slots=True)
class _Shape:
    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    experts: int
    context: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def build_tiny_model(
    path: Path,
    *,
    architecture: str = "llama",
    quant_type: QuantType = QuantType.F16,
    hidden: int = 256,
    layers: int = 6,
    heads: int = 8,
    kv_heads: int = 2,
    ffn: int = 512,
    vocabulary: int = 320,
    experts: int = 0,
    context: int = 2048,
    seed: int = 1,
    tied: bool = False,
    rope_factors: bool = False,
    extra: Mapping[str, WritableValue] | None = None,
    other_types: Mapping[str, QuantType] | None = None,
) -> Path:
    """Writes a model to `path` and returns it. The same arguments give the same bytes.

    Matrices and embedding have `quant_type`, norms, biases and routers float32; `other_types` gives matrices another
    type by a part of their name. `tied` leaves out `output.weight`, `rope_factors` adds `rope_freqs.weight`, `experts`
    (2 of them used) replaces each feed-forward network, `extra` adds or overrides metadata. The tokenizer is
    SentencePiece for `llama`, byte-level BPE for `qwen2` and `qwen2vl`.
    """
    shape = _Shape(architecture, hidden, layers, heads, kv_heads, ffn, vocabulary, experts, context)
    tensors = [*_ends(shape, tied, rope_factors)]
    for layer in range(layers):
        tensors += _layer(shape, f"blk.{layer}")
    sources = [source_of(tensor, _type_of(tensor, quant_type, other_types or {}), seed) for tensor in tensors]
    write_gguf(path, _metadata(shape) | dict(extra or {}), sources)
    return path


def every_type(first: int, layers: int = 6) -> dict[str, QuantType]:
    """Returns `other_types` for matrices that cycle through all types of the CPU, from number `first`."""
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [*(f"blk.{layer}.{part}" for layer in range(layers) for part in parts), "token_embd", "output.weight"]
    assert len(names) >= len(SUPPORTED_TYPES)
    return {name: SUPPORTED_TYPES[(first + i) % len(SUPPORTED_TYPES)] for i, name in enumerate(names)}


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """A tensor of normal numbers; if `exact`, it is float32 in models of any type."""

    name: str
    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0
    exact: bool = False


def matrix(name: str, *shape: int, gain: float = 1.0) -> RandomTensor:
    return RandomTensor(f"{name}.weight", shape, gain / shape[-1] ** 0.5)


def norm(name: str, width: int) -> RandomTensor:
    return RandomTensor(f"{name}.weight", (width,), 0.1, mean=1.0, exact=True)


def _ends(shape: _Shape, tied: bool, rope_factors: bool) -> Iterator[RandomTensor]:
    yield RandomTensor("token_embd.weight", (shape.vocabulary, shape.hidden), 3 / shape.hidden**0.5 if tied else 1.0)
    yield norm("output_norm", shape.hidden)
    if not tied:
        yield matrix("output", shape.vocabulary, shape.hidden, gain=3.0)
    if rope_factors:
        yield RandomTensor("rope_freqs.weight", (shape.head_dim // 2,), 0.2, mean=2.0, exact=True)


def _layer(shape: _Shape, name: str) -> Iterator[RandomTensor]:
    kv_width = shape.kv_heads * shape.head_dim
    yield norm(f"{name}.attn_norm", shape.hidden)
    yield matrix(f"{name}.attn_q", shape.hidden, shape.hidden, gain=1.5)
    yield matrix(f"{name}.attn_k", kv_width, shape.hidden, gain=1.5)
    yield matrix(f"{name}.attn_v", kv_width, shape.hidden)
    yield matrix(f"{name}.attn_output", shape.hidden, shape.hidden)
    if shape.architecture in _WITH_BIASES:
        for part, width in (("attn_q", shape.hidden), ("attn_k", kv_width), ("attn_v", kv_width)):
            yield RandomTensor(f"{name}.{part}.bias", (width,), 0.2, exact=True)
    yield norm(f"{name}.ffn_norm", shape.hidden)
    yield from _feed_forward(shape, name)


def _feed_forward(shape: _Shape, name: str) -> Iterator[RandomTensor]:
    if shape.experts == 0:
        yield matrix(f"{name}.ffn_gate", shape.ffn, shape.hidden)
        yield matrix(f"{name}.ffn_up", shape.ffn, shape.hidden)
        yield matrix(f"{name}.ffn_down", shape.hidden, shape.ffn)
        return
    router = (shape.experts, shape.hidden)
    yield RandomTensor(f"{name}.ffn_gate_inp.weight", router, 2 / shape.hidden**0.5, exact=True)
    yield matrix(f"{name}.ffn_gate_exps", shape.experts, shape.ffn, shape.hidden)
    yield matrix(f"{name}.ffn_up_exps", shape.experts, shape.ffn, shape.hidden)
    yield matrix(f"{name}.ffn_down_exps", shape.experts, shape.hidden, shape.ffn)


def _type_of(tensor: RandomTensor, quant_type: QuantType, others: Mapping[str, QuantType]) -> QuantType:
    if tensor.exact:
        return QuantType.F32
    return next((kind for part, kind in others.items() if part in tensor.name), quant_type)


def source_of(tensor: RandomTensor, kind: QuantType, seed: int) -> TensorSource:
    def produce() -> bytes:
        generator = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
        values: NDArray[np.float32] = generator.standard_normal(tensor.shape, np.float32)
        return quantize(values * np.float32(tensor.deviation) + np.float32(tensor.mean), kind)

    return TensorSource(tensor.name, kind, tensor.shape, produce)


def _metadata(shape: _Shape) -> dict[str, WritableValue]:
    numbers: dict[str, WritableValue] = {
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "block_count": shape.layers,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": shape.head_dim,
        "vocab_size": shape.vocabulary,
    }
    if shape.experts:
        numbers |= {"expert_count": shape.experts, "expert_used_count": 2}
    general: dict[str, WritableValue] = {
        "general.architecture": shape.architecture,
        "general.name": "tiny random model",
    }
    tokenizer = byte_level if shape.architecture in _WITH_BIASES else sentencepiece
    own = {f"{shape.architecture}.{key}": value for key, value in numbers.items()}
    return general | own | tokenizer(shape.vocabulary)
