"""Small encoders with random weights, by architecture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

from llamaclust.model.gguf.writer import WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from support.models.tiny_model import RandomTensor, matrix, norm, source_of
from support.models.tiny_tokenizers import word_pieces

HIDDEN, HEADS, FFN, LAYERS, CONTEXT = 64, 4, 96, 3, 1024
VOCABULARY = 320
ENCODERS = MappingProxyType({"bert": 1, "nomic-bert": 1000, "jina-bert-v2": 1})
"""Architectures, and the base of rotations where there are any."""
RANK = 4
"""The pooling type of rerankers."""
RERANKERS = ("bert", "jina-bert-v2")


def build_encoder(path: Path, name: str, pooling: int = 1, quant_type: QuantType = QuantType.F32) -> Path:
    """Writes an encoder to `path` and returns it. The same bytes on every machine."""
    ends = [*_ends(name), *(_classifier(name) if pooling == RANK and name in RERANKERS else ())]
    tensors = [*ends, *(tensor for layer in range(LAYERS) for tensor in _layer(name, f"blk.{layer}"))]
    kinds = {tensor.name: QuantType.F32 if tensor.exact else quant_type for tensor in tensors}
    write_gguf(path, _metadata(name, pooling), [source_of(tensor, kinds[tensor.name], seed=2) for tensor in tensors])
    return path


def _ends(name: str) -> Iterator[RandomTensor]:
    yield RandomTensor("token_embd.weight", (VOCABULARY, HIDDEN), 1.0)
    yield RandomTensor("token_types.weight", (2, HIDDEN), 0.5, exact=True)
    if name == "bert":
        yield RandomTensor("position_embd.weight", (CONTEXT, HIDDEN), 0.5, exact=True)
    yield from _norm("token_embd_norm")


def _classifier(name: str) -> Iterator[RandomTensor]:
    """As a reranker's: jina's has one layer."""
    width = 1 if name == "jina-bert-v2" else HIDDEN
    yield RandomTensor("cls.weight", (width, HIDDEN), 0.2, exact=True)
    yield RandomTensor("cls.bias", (width,), 0.2, exact=True)
    if width > 1:
        yield RandomTensor("cls.output.weight", (1, HIDDEN), 0.5, exact=True)
        yield RandomTensor("cls.output.bias", (1,), 0.2, exact=True)


def _norm(name: str) -> Iterator[RandomTensor]:
    yield norm(name, HIDDEN)
    yield RandomTensor(f"{name}.bias", (HIDDEN,), 0.2, exact=True)


def _layer(name: str, prefix: str) -> Iterator[RandomTensor]:
    parts = {"attn_qkv": 3 * HIDDEN} if name == "nomic-bert" else dict.fromkeys(("attn_q", "attn_k", "attn_v"), HIDDEN)
    for part, width in parts.items():
        yield matrix(f"{prefix}.{part}", width, HIDDEN, gain=1.5)
    yield matrix(f"{prefix}.attn_output", HIDDEN, HIDDEN)
    yield from _norm(f"{prefix}.attn_output_norm")
    if name != "bert":
        yield matrix(f"{prefix}.ffn_gate", FFN, HIDDEN)
    yield matrix(f"{prefix}.ffn_up", FFN, HIDDEN)
    yield matrix(f"{prefix}.ffn_down", HIDDEN, FFN)
    yield from _norm(f"{prefix}.layer_output_norm")
    biases = {"bert": {**parts, "attn_output": HIDDEN, "ffn_up": FFN, "ffn_down": HIDDEN}}
    biases["jina-bert-v2"] = {"attn_output": HIDDEN, "ffn_down": HIDDEN}
    for part, width in biases.get(name, {}).items():
        yield RandomTensor(f"{prefix}.{part}.bias", (width,), 0.3, exact=True)


def _metadata(name: str, pooling: int) -> dict[str, WritableValue]:
    numbers: dict[str, WritableValue] = {
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.layer_norm_epsilon": 1e-12,
        "attention.causal": False,
        "pooling_type": pooling,
    }
    if name == "nomic-bert":
        numbers["rope.freq_base"] = float(ENCODERS[name])
    own = {f"{name}.{key}": value for key, value in numbers.items()}
    return {"general.architecture": name, **own, **word_pieces(VOCABULARY)}
