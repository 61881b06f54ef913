"""Small random models for every architecture, like those of `tiny_model` for LLaMA. All features are far from neutral,
so that tests fail without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llamaclust.model.gguf.writer import WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType
from support.models.tiny.gemma3n import GEMMA3N, ends_of_gemma3n, layer_of_gemma3n
from support.models.tiny.gemma4 import GEMMA4, inputs_of_gemma4, layer_of_gemma4
from support.models.tiny.latent_models import LATENT_MODELS
from support.models.tiny.llama4 import TEXT_MODELS
from support.models.tiny.mamba_models import MAMBA_MODELS
from support.models.tiny.nextn import further_tensors
from support.models.tiny.shape import Tiny
from support.models.tiny.states import STATE_MODELS, convolution
from support.models.tiny_model import RandomTensor, matrix, norm, source_of
from support.models.tiny_tokenizers import byte_level, sentencepiece

VOCABULARY = 320
_CONTEXT = 2048
TOKENS = [1, 5, 9, 300, 33, 65, 100, 3, 7, 11, 277, 90, 2, 64, 127, 31, 260, 270, 280, 290, 19, 1, 150, 200]
"""The tokens of the recorded prefill."""
DECODED_TOKENS = [3 + 41 * step * step % 317 for step in range(1, 41)]
"""Tokens decoded one by one after TOKENS."""
DECODED_STRIDE = 4
"""Distance between recorded logits of decode steps."""

_BYTE_LEVEL = (
    *("qwen", "gpt", "falcon", "starcoder2", "smollm3", "olmo2", "exaone4", "seed_oss", "glm4moe", "cohere2"),
    *("lfm2", "deepseek2", "mistral4", "kimi-linear"),
)
_QKV = ("attn_q", "attn_k", "attn_v")
_PRODUCTS = ("attn_q.weight", "attn_output.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
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

_GPT_OSS: dict[str, Any] = {
    "layers": 4,
    "experts": 6,
    "biases": (*_QKV, "attn_output"),
    "expert_biases": True,
    "sinks": True,
    "norms": ("attn_norm", "post_attention_norm"),
    "keys": {
        "attention.sliding_window": 6,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 16,
    },
}
_GRANITE: dict[str, WritableValue] = {
    "embedding_scale": 3.0,
    "attention.scale": 0.125,
    "residual_scale": 0.5,
    "logit_scale": 4.0,
}

MODELS = MappingProxyType(
    {
        **STATE_MODELS,
        **MAMBA_MODELS,
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
        "smollm3": Tiny("smollm3", layers=5, tied=True),
        "mistral3": Tiny(
            "mistral3",
            keys={
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 16.0,
                "rope.scaling.original_context_length": 8,
                "rope.scaling.yarn_log_multiplier": 1.0,
                "attention.temperature_scale": 0.7,
            },
        ),
        "seed_oss": Tiny("seed_oss", head_dim=32, biases=_QKV, norms=("attn_norm", "post_attention_norm")),
        "ernie4_5": Tiny("ernie4_5", tied=True),
        "hunyuan-dense": Tiny("hunyuan-dense", head_norms=True, tied=True),
        "olmo2": Tiny("olmo2", whole_norms=True, norms=(), post_norms=True),
        "olmo2-windows": Tiny(
            "olmo2",
            layers=5,
            whole_norms=True,
            norms=(),
            post_norms=True,
            keys={
                "attention.sliding_window": 6,
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 16,
            },
        ),
        "exaone4": Tiny("exaone4", head_norms=True, norms=(), post_norms=True, tied=True),
        "exaone4-windows": Tiny(
            "exaone4",
            layers=64,
            hidden=32,
            ffn=32,
            heads=2,
            kv_heads=1,
            head_norms=True,
            norms=(),
            post_norms=True,
            keys={"attention.sliding_window": 6},
        ),
        "granite": Tiny("granite", keys=_GRANITE),
        "cohere2": Tiny(
            "cohere2",
            layers=5,
            layer_norms=("attn_norm",),
            norm_biases=False,
            tied=True,
            keys={"attention.sliding_window": 6, "logit_scale": 0.25},
        ),
        "granitemoe": Tiny("granitemoe", experts=6, shared_ffn=80, shared_gate=False, keys=_GRANITE),
        "gpt-oss": Tiny("gpt-oss", **_GPT_OSS),
        "gpt-oss-mxfp4": Tiny("gpt-oss", expert_type=QuantType.MXFP4, **_GPT_OSS),
        "glm4moe": Tiny(
            "glm4moe",
            layers=4,
            experts=8,
            shared_ffn=96,
            shared_gate=False,
            selection_bias=True,
            dense=1,
            biases=_QKV,
            norms=("attn_norm", "post_attention_norm"),
            keys={
                "rope.dimension_count": 8,
                "expert_shared_count": 1,
                "leading_dense_block_count": 1,
                "expert_weights_norm": True,
                "expert_weights_scale": 2.5,
                "expert_gating_func": 2,
            },
        ),
        "ernie4_5-moe": Tiny(
            "ernie4_5-moe",
            experts=8,
            shared_ffn=80,
            shared_gate=False,
            selection_bias=True,
            dense=1,
            keys={"interleave_moe_layer_step": 1, "leading_dense_block_count": 1},
        ),
        "hunyuan-moe": Tiny("hunyuan-moe", experts=6, shared_ffn=80, shared_gate=False, head_norms=True),
        "bailingmoe2": Tiny(
            "bailingmoe2",
            experts=16,
            used=4,
            shared_ffn=80,
            shared_gate=False,
            selection_bias=True,
            dense=1,
            fused=True,
            head_norms=True,
            keys={
                "rope.dimension_count": 8,
                "expert_shared_count": 1,
                "leading_dense_block_count": 1,
                "expert_weights_norm": True,
                "expert_weights_scale": 2.5,
                "expert_gating_func": 2,
                "expert_group_count": 4,
                "expert_group_used_count": 2,
            },
        ),
        "minimax-m2": Tiny(
            "minimax-m2",
            experts=8,
            selection_bias=True,
            whole_norms=True,
            keys={"rope.dimension_count": 8, "expert_gating_func": 2},
        ),
        **GEMMA3N,
        **GEMMA4,
        **LATENT_MODELS,
        **TEXT_MODELS,
    }
)


def build_architecture(path: Path, name: str, quant_type: QuantType = QuantType.F32) -> Path:
    """Writes one of MODELS to `path` and returns `path`; the bytes are the same on every machine."""
    return build_tiny(path, MODELS[name], quant_type)


def build_tiny(path: Path, tiny: Tiny, quant_type: QuantType = QuantType.F32) -> Path:
    """Writes a random model to `path`, the same on every machine; products of whole blocks have `quant_type`."""
    tensors = [*_ends(tiny), *inputs_of_gemma4(tiny, VOCABULARY), *ends_of_gemma3n(tiny, VOCABULARY)]
    layer_of = {"gemma3n": layer_of_gemma3n, "gemma4": layer_of_gemma4}.get(tiny.architecture, _layer)
    tensors += [tensor for layer in range(tiny.layers) for tensor in layer_of(tiny, layer)]
    tensors += further_tensors(tiny)
    write_gguf(path, _metadata(tiny), [source_of(each, _type(tiny, each, quant_type), seed=1) for each in tensors])
    return path


def _type(tiny: Tiny, tensor: RandomTensor, quant_type: QuantType) -> QuantType:
    is_quantized = tensor.name.endswith(_PRODUCTS) and tensor.shape[-1] % quant_type.info.block_size == 0
    others = tiny.expert_type if tensor.name.endswith("_exps.weight") else QuantType.F32
    return quant_type if is_quantized else others


def _ends(tiny: Tiny) -> Iterator[RandomTensor]:
    yield RandomTensor("token_embd.weight", (VOCABULARY, tiny.hidden), 3 / tiny.hidden**0.5 if tiny.tied else 1.0)
    if tiny.positions:
        yield RandomTensor("position_embd.weight", (_CONTEXT, tiny.hidden), 0.2)
    yield norm(tiny.last_norm, tiny.hidden)
    if tiny.layer_norms and tiny.norm_biases:
        yield RandomTensor("output_norm.bias", (tiny.hidden,), 0.2)
    if not tiny.tied:
        yield matrix("output", VOCABULARY, tiny.hidden, gain=3.0)
    rotating = tiny.keys.get("rope.dimension_count", tiny.head_dim)
    assert isinstance(rotating, int)
    for index, factor in enumerate(tiny.factors):
        yield RandomTensor(f"{factor}.weight", (rotating // 2,), 0.2, mean=2.0 + index)


def _layer(tiny: Tiny, layer: int) -> Iterator[RandomTensor]:
    name = f"blk.{layer}"
    for part in tiny.layer_norms or tiny.norms:
        yield norm(f"{name}.{part}", tiny.hidden)
        if tiny.layer_norms and tiny.norm_biases:
            yield RandomTensor(f"{name}.{part}.bias", (tiny.hidden,), 0.2)
    if tiny.attends(layer):
        yield from _attention(tiny, name)
    if layer in tiny.convolutions:
        yield from convolution(tiny, name)
    if tiny.mamba is not None and layer in tiny.mamba.layers:
        yield from tiny.mamba.tensors(name, tiny.hidden)
    if tiny.has_inner(layer):
        yield from _feed_forward(tiny, name) if tiny.is_dense(layer) else _experts(tiny, name)
    if tiny.post_norms:
        yield norm(f"{name}.post_attention_norm", tiny.hidden)
        yield norm(f"{name}.post_ffw_norm", tiny.hidden)


def _attention(tiny: Tiny, name: str) -> Iterator[RandomTensor]:
    if tiny.latent is not None:
        yield from tiny.latent.tensors(name, tiny.hidden, tiny.heads)
        return
    query, kv = tiny.heads * tiny.head_dim, tiny.kv_heads * tiny.head_dim
    products = (query * (1 + tiny.gated), kv, kv)
    widths = {"attn_qkv": query + 2 * kv} if tiny.fused else dict(zip(_QKV, products, strict=True))
    for part, width in widths.items():
        yield matrix(f"{name}.{part}", width, tiny.hidden, gain=1.5)
    yield matrix(f"{name}.attn_output", tiny.hidden, query)
    for part in tiny.biases:
        yield RandomTensor(f"{name}.{part}.bias", ((widths | {"ffn_up": tiny.ffn}).get(part, tiny.hidden),), 0.3)
    if tiny.head_norms or tiny.whole_norms:
        yield norm(f"{name}.attn_q_norm", query if tiny.whole_norms else tiny.head_dim)
        yield norm(f"{name}.attn_k_norm", kv if tiny.whole_norms else tiny.head_dim)
    if tiny.sinks:
        yield RandomTensor(f"{name}.attn_sinks.weight", (tiny.heads,), 1.0, mean=1.0)


def _feed_forward(tiny: Tiny, name: str, suffix: str = "", ffn: int | None = None) -> Iterator[RandomTensor]:
    width = ffn or tiny.ffn
    fused = tiny.fused and not tiny.experts
    if not fused and not tiny.plain:
        yield matrix(f"{name}.ffn_gate{suffix}", width, tiny.hidden)
    yield matrix(f"{name}.ffn_up{suffix}", width * (2 if fused and not tiny.plain else 1), tiny.hidden)
    yield matrix(f"{name}.ffn_down{suffix}", tiny.hidden, width)


def _experts(tiny: Tiny, name: str) -> Iterator[RandomTensor]:
    yield matrix(f"{name}.ffn_gate_inp", tiny.experts, tiny.hidden, gain=2.0)
    width = tiny.expert_width or tiny.hidden
    if tiny.expert_width:
        yield matrix(f"{name}.ffn_latent_down", width, tiny.hidden)
        yield matrix(f"{name}.ffn_latent_up", tiny.hidden, width)
    if not tiny.plain:
        yield matrix(f"{name}.ffn_gate_exps", tiny.experts, tiny.ffn, width)
    yield matrix(f"{name}.ffn_up_exps", tiny.experts, tiny.ffn, width)
    yield matrix(f"{name}.ffn_down_exps", tiny.experts, width, tiny.ffn)
    if tiny.expert_biases:
        yield RandomTensor(f"{name}.ffn_gate_inp.bias", (tiny.experts,), 0.5)
        for part, width in (("gate", tiny.ffn), ("up", tiny.ffn), ("down", tiny.hidden)):
            yield RandomTensor(f"{name}.ffn_{part}_exps.bias", (tiny.experts, width), 0.5)
    if tiny.selection_bias:
        yield RandomTensor(f"{name}.exp_probs_b.bias", (tiny.experts,), 0.3)
    if tiny.shared_ffn:
        if tiny.shared_gate:
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
        numbers |= {
            "expert_count": tiny.experts,
            "expert_used_count": tiny.used,
            "expert_feed_forward_length": tiny.ffn,
        }
    if tiny.latent is not None:
        numbers |= tiny.latent.keys()
    if tiny.delta is not None:
        numbers |= tiny.delta.keys()
    if tiny.mamba is not None:
        numbers |= tiny.mamba.keys()
    if tiny.shared_ffn:
        numbers |= {"expert_shared_feed_forward_length": tiny.shared_ffn}
    if tiny.nextn:
        numbers |= {"nextn_predict_layers": tiny.nextn}
    general: dict[str, WritableValue] = {
        "general.architecture": tiny.architecture,
        "general.name": "tiny random model",
    }
    tokenizer = byte_level if tiny.architecture.startswith(_BYTE_LEVEL) else sentencepiece
    own = {f"{tiny.architecture}.{key}": value for key, value in (numbers | tiny.keys).items()}
    return general | own | tokenizer(VOCABULARY)
