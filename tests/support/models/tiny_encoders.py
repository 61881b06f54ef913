"""Small encoders and rerankers with random weights, by architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

from llamaclust.model.gguf.model_file import ModelFile
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from support.models.tiny_model import RandomTensor, matrix, norm, source_of
from support.models.tiny_tokenizers import byte_level, sentencepiece, unigrams, word_pieces

HIDDEN, HEADS, FFN, LAYERS, CONTEXT = 64, 4, 96, 3, 1024
VOCABULARY = 320
WINDOW = 8
"""The window of encoders that have one: 4 tokens on either side."""
EXPERTS = 5
"""The experts of nomic-bert-moe's second layer; a token uses 2."""
RANK, CLS = 4, 2
"""GGUF's numbers of poolings."""
RERANKERS = ("bert", "jina-bert-v2", "modern-bert", "qwen3")


@dataclass(frozen=True, slots=True)
class TinyEncoder:
    """An architecture's tensors, its tokenizer, and its keys without the architecture's name."""

    qkv: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(("attn_q", "attn_k", "attn_v"), HIDDEN))
    biases: tuple[str, ...] = ()  # the layer's products with biases
    gated: bool = True
    vocabulary: Callable[[int], dict[str, WritableValue]] = word_pieces
    keys: Mapping[str, WritableValue] = field(default_factory=dict)


_ALL_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
_FUSED = {"attn_qkv": 3 * HIDDEN}


def _modern_words(vocabulary: int) -> dict[str, WritableValue]:
    flags = {f"tokenizer.ggml.add_{name}_token": True for name in ("bos", "eos", "sep")}
    separator = {"tokenizer.ggml.seperator_token_id": vocabulary - 1}
    return {**byte_level(vocabulary, "modern-bert"), **flags, **separator}


def _ended_pieces(vocabulary: int) -> dict[str, WritableValue]:
    return {**sentencepiece(vocabulary), "tokenizer.ggml.add_eos_token": True}


ENCODERS: Mapping[str, TinyEncoder] = MappingProxyType(
    {
        "bert": TinyEncoder(biases=_ALL_BIASES, gated=False),
        "nomic-bert": TinyEncoder(qkv=_FUSED, keys={"rope.freq_base": 1000.0}),
        "jina-bert-v2": TinyEncoder(biases=("attn_output", "ffn_down")),
        "jina-bert-v3": TinyEncoder(
            qkv=_FUSED,
            biases=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
            gated=False,
            vocabulary=unigrams,
            keys={"rope.freq_base": 500.0},
        ),
        "nomic-bert-moe": TinyEncoder(
            qkv=_FUSED,
            biases=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
            gated=False,
            vocabulary=unigrams,
            keys={"rope.freq_base": 1000.0, "moe_every_n_layers": 2, "expert_count": EXPERTS, "expert_used_count": 2},
        ),
        "modern-bert": TinyEncoder(
            qkv=_FUSED,
            vocabulary=_modern_words,
            keys={
                "rope.freq_base": 1000.0,
                "rope.freq_base_swa": 50.0,
                "rope.scaling.type": "none",
                "attention.sliding_window": WINDOW,
                "hidden_activation": "gelu",
            },
        ),
        "gemma-embedding": TinyEncoder(
            qkv={"attn_q": 2 * HIDDEN, "attn_k": HIDDEN, "attn_v": HIDDEN},
            vocabulary=_ended_pieces,
            keys={
                "rope.freq_base": 1000.0,
                "attention.sliding_window": WINDOW,
                "attention.sliding_window_pattern": 3,
                "attention.head_count_kv": HEADS // 2,
                "attention.key_length": 2 * HIDDEN // HEADS,
                "attention.value_length": 2 * HIDDEN // HEADS,
                "dense_2_feat_in": HIDDEN,
                "dense_2_feat_out": 2 * HIDDEN,
                "dense_3_feat_in": 2 * HIDDEN,
                "dense_3_feat_out": HIDDEN,
            },
        ),
    }
)
_QWEN3 = TinyEncoder(
    vocabulary=byte_level,
    keys={
        "attention.key_length": HIDDEN // HEADS,
        "attention.value_length": HIDDEN // HEADS,
        "rope.dimension_count": HIDDEN // HEADS,
    },
)
RERANK_TEMPLATE = "<|im_start|>user\n<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n"
_PRE_NORMED = ("modern-bert", "gemma-embedding", "qwen3")


def build_encoder(
    path: Path,
    name: str,
    pooling: int = 1,
    quant_type: QuantType = QuantType.F32,
    *,
    without: tuple[str, ...] = (),
    added: tuple[RandomTensor, ...] = (),
    keys: Mapping[str, WritableValue] | None = None,
) -> Path:
    """Writes an encoder, or a reranker if `pooling` is RANK, and returns `path`; the bytes are the same on every
    machine. `without` leaves out tensors and metadata by name, `added` adds tensors, and `keys` replace metadata (the
    architecture's without its name)."""
    ends = [*_ends(name), *(_classifier(name) if pooling == RANK and name in RERANKERS else ())]
    tensors = [*ends, *(tensor for layer in range(LAYERS) for tensor in _layer(name, f"blk.{layer}"))]
    kept = [*(tensor for tensor in tensors if tensor.name not in without), *added]
    kinds = {tensor.name: QuantType.F32 if tensor.exact else quant_type for tensor in kept}
    sources = [source_of(tensor, kinds[tensor.name], seed=2) for tensor in kept]
    metadata = _metadata(name, pooling, keys or {})
    write_gguf(path, {key: value for key, value in metadata.items() if key not in without}, sources)
    return path


def with_fused_gates(path: Path, file: ModelFile) -> Path:
    """Writes the encoder with the rows of each `ffn_gate` before those of its `ffn_up`, in one tensor `ffn_up`."""
    sources = []
    for name, tensor in file.tensors.items():
        parts = [tensor]
        if name.endswith("ffn_up.weight"):
            parts = [file.tensor(name.replace("ffn_up", "ffn_gate")), tensor]
        data = b"".join(bytes(part.read()) for part in parts)
        if "ffn_gate" not in name:
            shape = (len(parts) * tensor.shape[0], *tensor.shape[1:])
            sources.append(TensorSource(name, tensor.quant_type, shape, partial(bytes, data)))
    write_gguf(path, file.metadata, sources)
    return path


def _shape(name: str) -> TinyEncoder:
    return _QWEN3 if name == "qwen3" else ENCODERS[name]


def _ends(name: str) -> Iterator[RandomTensor]:
    yield RandomTensor("token_embd.weight", (VOCABULARY, HIDDEN), 0.2 if name == "gemma-embedding" else 1.0)
    if name in _PRE_NORMED:
        yield norm("output_norm", HIDDEN)
    else:
        yield RandomTensor("token_types.weight", (2, HIDDEN), 0.5, exact=True)
    if name == "bert":
        yield RandomTensor("position_embd.weight", (CONTEXT, HIDDEN), 0.5, exact=True)
    if name == "modern-bert":
        yield norm("token_embd_norm", HIDDEN)
    elif name not in _PRE_NORMED:
        yield from _norm("token_embd_norm")
    if name == "gemma-embedding":
        yield matrix("dense_2", 2 * HIDDEN, HIDDEN)
        yield matrix("dense_3", HIDDEN, 2 * HIDDEN)


def _classifier(name: str) -> Iterator[RandomTensor]:
    """Yields a reranker's classifier: one layer in jina's, two rows of the head in qwen's."""
    if name == "qwen3":
        yield RandomTensor("cls.output.weight", (2, HIDDEN), 0.2, exact=True)
        return
    width = 1 if name == "jina-bert-v2" else HIDDEN
    yield RandomTensor("cls.weight", (width, HIDDEN), 0.2, exact=True)
    if name == "modern-bert":
        yield norm("cls.norm", HIDDEN)
    else:
        yield RandomTensor("cls.bias", (width,), 0.2, exact=True)
    if width > 1:
        yield RandomTensor("cls.output.weight", (1, HIDDEN), 0.5, exact=True)
        yield RandomTensor("cls.output.bias", (1,), 0.2, exact=True)


def _norm(name: str) -> Iterator[RandomTensor]:
    yield norm(name, HIDDEN)
    yield RandomTensor(f"{name}.bias", (HIDDEN,), 0.2, exact=True)


def _layer(name: str, prefix: str) -> Iterator[RandomTensor]:
    tiny = _shape(name)
    for part, width in tiny.qkv.items():
        yield matrix(f"{prefix}.{part}", width, HIDDEN, gain=1.5)
    yield matrix(f"{prefix}.attn_output", HIDDEN, tiny.qkv.get("attn_q", HIDDEN))
    inner = dict(_inner(name, prefix))
    yield from inner.values()
    widths = {**tiny.qkv, "attn_output": HIDDEN, "ffn_up": FFN, "ffn_down": HIDDEN}
    for part in tiny.biases:
        if not part.startswith("ffn_") or part in inner:
            yield RandomTensor(f"{prefix}.{part}.bias", (widths[part],), 0.3, exact=True)
    yield from _norms(name, prefix)


def _inner(name: str, prefix: str) -> Iterator[tuple[str, RandomTensor]]:
    """Yields the matrices after attention by their names in the layer."""
    shapes: dict[str, tuple[int, ...]] = {
        "ffn_up": (2 * FFN if name == "modern-bert" else FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }
    if name == "nomic-bert-moe" and prefix == "blk.1":
        yield "ffn_gate_inp", RandomTensor(f"{prefix}.ffn_gate_inp.weight", (EXPERTS, HIDDEN), 0.25, exact=True)
        shapes = {f"{part}_exps": (EXPERTS, *shape) for part, shape in shapes.items()}
    elif _shape(name).gated and name != "modern-bert":
        shapes["ffn_gate"] = (FFN, HIDDEN)
    for part, shape in shapes.items():
        yield part, matrix(f"{prefix}.{part}", *shape)


def _norms(name: str, prefix: str) -> Iterator[RandomTensor]:
    if name not in _PRE_NORMED:
        yield from _norm(f"{prefix}.attn_output_norm")
        yield from _norm(f"{prefix}.layer_output_norm")
        return
    if not (name == "modern-bert" and prefix == "blk.0"):
        yield norm(f"{prefix}.attn_norm", HIDDEN)
    yield norm(f"{prefix}.ffn_norm", HIDDEN)
    if name != "modern-bert":
        width = 2 * HIDDEN // HEADS if name == "gemma-embedding" else HIDDEN // HEADS
        yield norm(f"{prefix}.attn_q_norm", width)
        yield norm(f"{prefix}.attn_k_norm", width)
    if name == "gemma-embedding":
        yield norm(f"{prefix}.post_attention_norm", HIDDEN)
        yield norm(f"{prefix}.post_ffw_norm", HIDDEN)


def _metadata(name: str, pooling: int, keys: Mapping[str, WritableValue]) -> dict[str, WritableValue]:
    numbers: dict[str, WritableValue] = {
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "pooling_type": pooling,
    }
    if name in ("gemma-embedding", "qwen3"):
        numbers["attention.layer_norm_rms_epsilon"] = 1e-6
    else:
        numbers["attention.layer_norm_epsilon"] = 1e-12
    if name != "qwen3":
        numbers["attention.causal"] = False
    ranking: dict[str, WritableValue] = {}
    if pooling == RANK and name == "modern-bert":
        numbers["classifier.pooling_type"] = CLS
    if pooling == RANK and name == "qwen3":
        numbers["classifier.output_labels"] = ["yes", "no"]
        ranking["tokenizer.chat_template.rerank"] = RERANK_TEMPLATE
    own = {f"{name}.{key}": value for key, value in {**numbers, **_shape(name).keys}.items()}
    given = {key if key.startswith("tokenizer.") else f"{name}.{key}": value for key, value in keys.items()}
    return {"general.architecture": name, **own, **_shape(name).vocabulary(VOCABULARY), **ranking, **given}
