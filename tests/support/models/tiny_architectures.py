"""Small models of random weights for every architecture, as `tiny_model` makes them for LLaMA: what is special to each
of them is there and far from neutral, so that leaving it out is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llamaclust.model.gguf.writer import WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from support.models.tiny_model import RandomTensor, matrix, norm, source_of
from support.models.tiny_tokenizers import byte_level, sentencepiece

VOCABULARY = 320
_CONTEXT = 2048
TOKENS = [1, 5, 9, 300, 33, 65, 100, 3, 7, 11, 277, 90, 2, 64, 127, 31, 260, 270, 280, 290, 19, 1, 150, 200]
"""What the recorded logits are of."""


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model: its shape, which tensors it has, and keys (without the architecture's name) beside those of its shape.

    `context`: tokens that it is set up for, here and in llama.cpp.
    """

    architecture: str
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    experts: int = 0
    shared_ffn: int = 0
    biases: tuple[str, ...] = ()  # of which products in a layer
    fused: bool = False  # q, k and v in one tensor; gate and up in one
    head_norms: bool = False
    post_norms: bool = False
    tied: bool = False
    layer_norms: tuple[str, ...] = ()  # norms with a mean and a bias: those of a layer
    positions: bool = False
    plain: bool = False  # no gate in the feed-forward network
    factors: tuple[str, ...] = ()
    context: int = 256
    keys: dict[str, WritableValue] = field(default_factory=dict)


_QKV = ("attn_q", "attn_k", "attn_v")
_GEMMA: dict[str, Any] = {"hidden": 64, "head_dim": 32, "tied": True}
_PHI3: dict[str, Any] = {
    "fused": True,
    "factors": ("rope_factors_short", "rope_factors_long"),
    "keys": {
        "rope.scaling.original_context_length": 512,
        "rope.scaling.attn_factor": 1.19,
        "rope.dimension_count": 12,
    },
}

MODELS = MappingProxyType(
    {
        "llama-experts": Tiny("llama", experts=6),
        "llama-linear": Tiny(
            "llama",
            head_dim=24,
            biases=(*_QKV, "attn_output"),
            tied=True,
            keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        ),
        "llama-yarn": Tiny(
            "llama",
            factors=("rope_freqs",),
            keys={
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 64,
            },
        ),
        "internlm2": Tiny("internlm2"),
        "qwen2moe": Tiny("qwen2moe", experts=6, shared_ffn=80, biases=_QKV),
        "qwen3": Tiny("qwen3", head_dim=32, head_norms=True, tied=True),
        "qwen3moe": Tiny("qwen3moe", head_dim=32, head_norms=True, experts=6),
        "phi3-short": Tiny("phi3", **_PHI3),
        "phi3-long": Tiny("phi3", **_PHI3, context=1024),
        "chatglm": Tiny("chatglm", fused=True, biases=("attn_qkv",), keys={"rope.dimension_count": 8}),
        "falcon": Tiny("falcon", kv_heads=1, fused=True, layer_norms=("attn_norm",), plain=True),
        "falcon-two-norms": Tiny(
            "falcon", kv_heads=2, fused=True, layer_norms=("attn_norm", "attn_norm_2"), plain=True, tied=True
        ),
        "gpt2": Tiny(
            "gpt2",
            kv_heads=4,
            fused=True,
            biases=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
            layer_norms=("attn_norm", "ffn_norm"),
            plain=True,
            tied=True,
            positions=True,
        ),
        "starcoder2": Tiny(
            "starcoder2",
            biases=(*_QKV, "attn_output", "ffn_up", "ffn_down"),
            layer_norms=("attn_norm", "ffn_norm"),
            plain=True,
        ),
        "baichuan-13b": Tiny("baichuan", hidden=96, layers=40, heads=6, kv_heads=6),
        "gemma": Tiny("gemma", kv_heads=1, **_GEMMA),
        "gemma2": Tiny(
            "gemma2",
            layers=4,
            post_norms=True,
            **_GEMMA,
            keys={"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "attention.sliding_window": 6},
        ),
        "gemma3": Tiny(
            "gemma3",
            layers=7,
            head_norms=True,
            post_norms=True,
            **_GEMMA,
            keys={
                "attention.sliding_window": 6,
                "rope.freq_base": 1e6,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0,
            },
        ),
    }
)


def build_architecture(path: Path, name: str) -> Path:
    """Writes one of MODELS to `path` and returns it. The same bytes on every machine."""
    tiny = MODELS[name]
    tensors = [*_ends(tiny)]
    for layer in range(tiny.layers):
        tensors += _layer(tiny, f"blk.{layer}")
    sources = [source_of(tensor, QuantType.F32, seed=1) for tensor in tensors]
    write_gguf(path, _metadata(tiny), sources)
    return path


def _ends(tiny: Tiny) -> Iterator[RandomTensor]:
    yield RandomTensor("token_embd.weight", (VOCABULARY, tiny.hidden), 3 / tiny.hidden**0.5 if tiny.tied else 1.0)
    if tiny.positions:
        yield RandomTensor("position_embd.weight", (_CONTEXT, tiny.hidden), 0.2)
    yield norm("output_norm", tiny.hidden)
    if tiny.layer_norms:
        yield RandomTensor("output_norm.bias", (tiny.hidden,), 0.2)
    if not tiny.tied:
        yield matrix("output", VOCABULARY, tiny.hidden, gain=3.0)
    rotating = tiny.keys.get("rope.dimension_count", tiny.head_dim)
    assert isinstance(rotating, int)
    for index, factor in enumerate(tiny.factors):
        yield RandomTensor(f"{factor}.weight", (rotating // 2,), 0.2, mean=2.0 + index)


def _layer(tiny: Tiny, name: str) -> Iterator[RandomTensor]:
    for part in tiny.layer_norms:
        yield norm(f"{name}.{part}", tiny.hidden)
        yield RandomTensor(f"{name}.{part}.bias", (tiny.hidden,), 0.2)
    if not tiny.layer_norms:
        yield norm(f"{name}.attn_norm", tiny.hidden)
        yield norm(f"{name}.ffn_norm", tiny.hidden)
    yield from _attention(tiny, name)
    yield from _experts(tiny, name) if tiny.experts else _feed_forward(tiny, name)
    if tiny.post_norms:
        yield norm(f"{name}.post_attention_norm", tiny.hidden)
        yield norm(f"{name}.post_ffw_norm", tiny.hidden)


def _attention(tiny: Tiny, name: str) -> Iterator[RandomTensor]:
    query, kv = tiny.heads * tiny.head_dim, tiny.kv_heads * tiny.head_dim
    widths = {"attn_qkv": query + 2 * kv} if tiny.fused else dict(zip(_QKV, (query, kv, kv), strict=True))
    for part, width in widths.items():
        yield matrix(f"{name}.{part}", width, tiny.hidden, gain=1.5)
    yield matrix(f"{name}.attn_output", tiny.hidden, query)
    for part in tiny.biases:
        yield RandomTensor(f"{name}.{part}.bias", ((widths | {"ffn_up": tiny.ffn}).get(part, tiny.hidden),), 0.3)
    if tiny.head_norms:
        yield norm(f"{name}.attn_q_norm", tiny.head_dim)
        yield norm(f"{name}.attn_k_norm", tiny.head_dim)


def _feed_forward(tiny: Tiny, name: str, suffix: str = "", ffn: int | None = None) -> Iterator[RandomTensor]:
    width = ffn or tiny.ffn
    if not tiny.fused and not tiny.plain:
        yield matrix(f"{name}.ffn_gate{suffix}", width, tiny.hidden)
    yield matrix(f"{name}.ffn_up{suffix}", width * (2 if tiny.fused and not tiny.plain else 1), tiny.hidden)
    yield matrix(f"{name}.ffn_down{suffix}", tiny.hidden, width)


def _experts(tiny: Tiny, name: str) -> Iterator[RandomTensor]:
    yield matrix(f"{name}.ffn_gate_inp", tiny.experts, tiny.hidden, gain=2.0)
    yield matrix(f"{name}.ffn_gate_exps", tiny.experts, tiny.ffn, tiny.hidden)
    yield matrix(f"{name}.ffn_up_exps", tiny.experts, tiny.ffn, tiny.hidden)
    yield matrix(f"{name}.ffn_down_exps", tiny.experts, tiny.hidden, tiny.ffn)
    if tiny.shared_ffn:
        yield RandomTensor(f"{name}.ffn_gate_inp_shexp.weight", (tiny.hidden,), 2 / tiny.hidden**0.5)
        yield from _feed_forward(tiny, name, "_shexp", tiny.shared_ffn)


def _metadata(tiny: Tiny) -> dict[str, WritableValue]:
    numbers: dict[str, WritableValue] = {
        "context_length": _CONTEXT,
        "embedding_length": tiny.hidden,
        "block_count": tiny.layers,
        "feed_forward_length": tiny.ffn,
        "attention.head_count": tiny.heads,
        "attention.head_count_kv": tiny.kv_heads,
        "attention.key_length": tiny.head_dim,
        "attention.value_length": tiny.head_dim,
        f"attention.layer_norm{'' if tiny.layer_norms else '_rms'}_epsilon": 1e-5,
        "rope.dimension_count": tiny.head_dim,
        "vocab_size": VOCABULARY,
    }
    if tiny.experts:
        numbers |= {"expert_count": tiny.experts, "expert_used_count": 3, "expert_feed_forward_length": tiny.ffn}
    if tiny.shared_ffn:
        numbers |= {"expert_shared_feed_forward_length": tiny.shared_ffn}
    general: dict[str, WritableValue] = {
        "general.architecture": tiny.architecture,
        "general.name": "tiny random model",
    }
    tokenizer = byte_level if tiny.architecture.startswith(("qwen", "gpt2", "falcon", "starcoder2")) else sentencepiece
    own = {f"{tiny.architecture}.{key}": value for key, value in (numbers | tiny.keys).items()}
    return general | own | tokenizer(VOCABULARY)
