"""Tiny random checkpoints in Hugging Face's form for each architecture: configuration and tensors."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.models.checkpoints.gemma3n import GEMMA3N_KEYS, gemma3n_ends, gemma3n_layer
from support.models.checkpoints.gemma4 import EXPERT_KEYS, INPUT_KEYS, gemma4_ends, gemma4_layer
from support.models.checkpoints.latent import LATENT_CASES
from support.models.checkpoints.mixtures import (
    BAILING_KEYS,
    ERNIE_MOE_KEYS,
    ERNIE_PREDICTION,
    HUNYUAN_MOE_KEYS,
    MINIMAX_KEYS,
    bailing_layer,
    cohere2_layer,
    ernie_moe_layer,
    exaone4_layer,
    gpt_oss_layer,
    granitemoe_layer,
    hunyuan_layer,
    hunyuan_moe_layer,
    minimax_layer,
)
from support.models.checkpoints.qwen_delta import DELTA_KEYS, MOE_KEYS, delta_layers
from support.models.checkpoints.shapes import (
    COMMON,
    HEAD,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    WORDS,
    Shapes,
    attention_shapes,
    ends,
    expert_shapes,
    gated_shapes,
    head,
    layer_norms,
    per_layer,
)


def _llama(layer: str) -> Shapes:
    return {**layer_norms(layer), **attention_shapes(layer), **gated_shapes(f"{layer}.mlp")}


def _mixtral(layer: str) -> Shapes:
    moe = f"{layer}.block_sparse_moe"
    shapes = {**layer_norms(layer), **attention_shapes(layer), f"{moe}.gate.weight": (4, HIDDEN)}
    for expert in range(4):
        shapes |= {f"{moe}.experts.{expert}.{w}.weight": (INNER, HIDDEN) for w in ("w1", "w3")}
        shapes[f"{moe}.experts.{expert}.w2.weight"] = (HIDDEN, INNER)
    return shapes


def _baichuan(layer: str) -> Shapes:
    packed = {f"{layer}.self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN)}
    return {
        **layer_norms(layer),
        **packed,
        f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        **gated_shapes(f"{layer}.mlp"),
    }


def _qwen2(layer: str) -> Shapes:
    return {**layer_norms(layer), **attention_shapes(layer, bias=True), **gated_shapes(f"{layer}.mlp")}


def _qwen3(layer: str) -> Shapes:
    return {**_llama(layer), **{f"{layer}.self_attn.{part}_norm.weight": (HEAD,) for part in "qk"}}


def _qwen2moe(layer: str) -> Shapes:
    shared = {**gated_shapes(f"{layer}.mlp.shared_expert", 64), f"{layer}.mlp.shared_expert_gate.weight": (1, HIDDEN)}
    return {**layer_norms(layer), **attention_shapes(layer, bias=True), **expert_shapes(layer), **shared}


def _qwen3moe(layer: str) -> Shapes:
    norms = {f"{layer}.self_attn.{part}_norm.weight": (HEAD,) for part in "qk"}
    return {**layer_norms(layer), **attention_shapes(layer), **norms, **expert_shapes(layer)}


def _chatglm(layer: str) -> Shapes:
    packed = (HEADS + 2 * KV_HEADS) * HEAD
    attention, mlp = f"{layer}.self_attention", f"{layer}.mlp"
    return {
        **layer_norms(layer),
        f"{attention}.query_key_value.weight": (packed, HIDDEN),
        f"{attention}.query_key_value.bias": (packed,),
        f"{attention}.dense.weight": (HIDDEN, HIDDEN),
        f"{mlp}.dense_h_to_4h.weight": (2 * INNER, HIDDEN),
        f"{mlp}.dense_4h_to_h.weight": (HIDDEN, INNER),
    }


def _glm(layer: str) -> Shapes:
    shapes = {
        **layer_norms(layer),
        **attention_shapes(layer, bias=True),
        f"{layer}.mlp.gate_up_proj.weight": (2 * INNER, HIDDEN),
    }
    return {**shapes, f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER)}


def _glm4(layer: str) -> Shapes:
    return {**_glm(layer), **{f"{layer}.post_{part}_layernorm.weight": (HIDDEN,) for part in ("self_attn", "mlp")}}


def _phi3(layer: str) -> Shapes:
    return {
        **layer_norms(layer),
        f"{layer}.self_attn.qkv_proj.weight": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
        f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{layer}.mlp.gate_up_proj.weight": (2 * INNER, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
    }


def _internlm2(layer: str) -> Shapes:
    return {
        f"{layer}.attention_norm.weight": (HIDDEN,),
        f"{layer}.ffn_norm.weight": (HIDDEN,),
        f"{layer}.attention.wqkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
        f"{layer}.attention.wo.weight": (HIDDEN, HIDDEN),
        f"{layer}.feed_forward.w1.weight": (INNER, HIDDEN),
        f"{layer}.feed_forward.w3.weight": (INNER, HIDDEN),
        f"{layer}.feed_forward.w2.weight": (HIDDEN, INNER),
    }


def _gemma2(layer: str) -> Shapes:
    more = {f"{layer}.{part}_feedforward_layernorm.weight": (HIDDEN,) for part in ("pre", "post")}
    return {**_llama(layer), **more}


def _gemma3(layer: str) -> Shapes:
    return {**_gemma2(layer), **{f"{layer}.self_attn.{part}_norm.weight": (HEAD,) for part in "qk"}}


def _olmo2(layer: str) -> Shapes:
    norms: Shapes = {f"{layer}.post_{part}_layernorm.weight": (HIDDEN,) for part in ("attention", "feedforward")}
    norms |= {
        f"{layer}.self_attn.{part}_norm.weight": (heads * HEAD,) for part, heads in (("q", HEADS), ("k", KV_HEADS))
    }
    return {**norms, **attention_shapes(layer), **gated_shapes(f"{layer}.mlp")}


def _glm4moe(layer: str) -> Shapes:
    """Returns shapes of the first layer (dense), of others (with experts), or of the MTP head after the last."""
    number = int(layer.rpartition(".")[2])
    shapes = {**layer_norms(layer), **attention_shapes(layer, bias=True)}
    shapes |= {f"{layer}.self_attn.{part}_norm.weight": (HEAD,) for part in "qk"}
    if number == 0:
        return {**shapes, **gated_shapes(f"{layer}.mlp")}
    shapes |= {**expert_shapes(layer), **gated_shapes(f"{layer}.mlp.shared_experts", 32)}
    shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (4,)
    if number == LAYERS:
        shapes |= {f"{layer}.{norm}.weight": (HIDDEN,) for norm in ("enorm", "hnorm", "shared_head.norm")}
        shapes |= {f"{layer}.{name}.weight": (WORDS, HIDDEN) for name in ("embed_tokens", "shared_head.head")}
        shapes[f"{layer}.eh_proj.weight"] = (HIDDEN, 2 * HIDDEN)
    return shapes


def _falcon(layer: str, norms: tuple[str, ...] = ("input_layernorm",)) -> Shapes:
    vectors = {f"{layer}.{norm}.{kind}": (HIDDEN,) for norm in norms for kind in ("weight", "bias")}
    return {
        **vectors,
        f"{layer}.self_attention.query_key_value.weight": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
        f"{layer}.self_attention.dense.weight": (HIDDEN, HIDDEN),
        f"{layer}.mlp.dense_h_to_4h.weight": (4 * HIDDEN, HIDDEN),
        f"{layer}.mlp.dense_4h_to_h.weight": (HIDDEN, 4 * HIDDEN),
    }


def _starcoder2(layer: str) -> Shapes:
    shapes = {**layer_norms(layer), **attention_shapes(layer, bias=True), f"{layer}.self_attn.o_proj.bias": (HIDDEN,)}
    shapes |= {f"{layer}.mlp.c_fc.weight": (INNER, HIDDEN), f"{layer}.mlp.c_fc.bias": (INNER,)}
    shapes |= {f"{layer}.mlp.c_proj.weight": (HIDDEN, INNER), f"{layer}.mlp.c_proj.bias": (HIDDEN,)}
    return shapes | {f"{layer}.{norm}_layernorm.bias": (HIDDEN,) for norm in ("input", "post_attention")}


def _gpt2(layer: str) -> Shapes:
    shapes: Shapes = {f"{layer}.{norm}.{kind}": (HIDDEN,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    for name, rows, columns in (
        ("attn.c_attn", HIDDEN, 3 * HIDDEN),
        ("attn.c_proj", HIDDEN, HIDDEN),
        ("mlp.c_fc", HIDDEN, 4 * HIDDEN),
        ("mlp.c_proj", 4 * HIDDEN, HIDDEN),
    ):
        shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (columns,)}
    return shapes


_GLM_ENDS: Shapes = {
    "transformer.embedding.word_embeddings.weight": (WORDS, HIDDEN),
    "transformer.encoder.final_layernorm.weight": (HIDDEN,),
    "transformer.output_layer.weight": (WORDS, HIDDEN),
}
_INTERN_ENDS: Shapes = {
    "model.tok_embeddings.weight": (WORDS, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "output.weight": (WORDS, HIDDEN),
}
_FALCON_ENDS: Shapes = {
    "transformer.word_embeddings.weight": (WORDS, HIDDEN),
    "transformer.ln_f.weight": (HIDDEN,),
    "transformer.ln_f.bias": (HIDDEN,),
    "lm_head.weight": (WORDS, HIDDEN),
}
_BAILING_ENDS: Shapes = {"model.word_embeddings.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,)}
_GPT2_ENDS: Shapes = {"wte.weight": (WORDS, HIDDEN), "wpe.weight": (256, HIDDEN)} | {
    f"ln_f.{kind}": (HIDDEN,) for kind in ("weight", "bias")
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GLM_MOE = {
    "head_dim": HEAD,
    "use_qk_norm": True,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_nextn_predict_layers": 1,
}
_MINISTRAL = {
    "head_dim": HEAD,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
_GEMMA = {"head_dim": HEAD, "sliding_window": 64}
_FALCON_KEYS = {"num_kv_heads": KV_HEADS, "layer_norm_epsilon": 1e-5, "new_decoder_architecture": True}
_GLM_KEYS = {
    "num_layers": LAYERS,
    "ffn_hidden_size": INNER,
    "kv_channels": HEAD,
    "multi_query_attention": True,
    "multi_query_group_num": KV_HEADS,
    "padded_vocab_size": WORDS,
    "seq_length": 256,
    "layernorm_epsilon": 1e-5,
    "rope_ratio": 50,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
}
_GPT2_KEYS = {
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "n_ctx": 256,
    "vocab_size": WORDS,
    "layer_norm_epsilon": 1e-5,
}

CASES: Mapping[str, tuple[dict[str, Any], Shapes]] = {
    "LlamaForCausalLM": (COMMON, {**ends(), **head(), **per_layer(_llama)}),
    "MistralForCausalLM": (COMMON | {"sliding_window": 64}, {**ends(), **head(), **per_layer(_llama)}),
    "SmolLM3ForCausalLM": (
        COMMON | {"tie_word_embeddings": True, "no_rope_layers": [1] * LAYERS},
        {**ends(), **per_layer(_llama)},
    ),
    "Ministral3ForCausalLM": (COMMON | _MINISTRAL, {**ends(), **head(), **per_layer(_llama)}),
    "MixtralForCausalLM": (
        COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2},
        {**ends(), **head(), **per_layer(_mixtral)},
    ),
    "BaichuanForCausalLM": (
        COMMON | {"num_key_value_heads": None, "max_position_embeddings": None, "model_max_length": 256},
        {**ends(), **head(), **per_layer(_baichuan)},
    ),
    "Qwen2ForCausalLM": (COMMON | {"tie_word_embeddings": True}, {**ends(), **per_layer(_qwen2)}),
    "Qwen2MoeForCausalLM": (
        COMMON | _MOE | {"shared_expert_intermediate_size": 64},
        {**ends(), **head(), **per_layer(_qwen2moe)},
    ),
    "Qwen3ForCausalLM": (COMMON | {"head_dim": HEAD}, {**ends(), **head(), **per_layer(_qwen3)}),
    "Qwen3MoeForCausalLM": (
        COMMON | _MOE | {"head_dim": HEAD, "norm_topk_prob": True},
        {**ends(), **head(), **per_layer(_qwen3moe)},
    ),
    "Qwen3NextForCausalLM": (
        COMMON | DELTA_KEYS | MOE_KEYS | {"mtp_num_hidden_layers": None},
        {**ends(), **head(), **delta_layers("next")},
    ),
    "Qwen3_5ForCausalLM": (COMMON | DELTA_KEYS, {**ends(), **head(), **delta_layers("dense")}),
    "Qwen3_5MoeForCausalLM": (
        COMMON | DELTA_KEYS | MOE_KEYS | {"intermediate_size": None},
        {**ends(), **head(), **delta_layers("moe")},
    ),
    "ChatGLMModel": (_GLM_KEYS, {**_GLM_ENDS, **per_layer(_chatglm, "transformer.encoder.layers")}),
    "GlmForCausalLM": (COMMON | {"head_dim": HEAD}, {**ends(), **head(), **per_layer(_glm)}),
    "Glm4ForCausalLM": (COMMON | {"head_dim": HEAD}, {**ends(), **head(), **per_layer(_glm4)}),
    "Olmo2ForCausalLM": (COMMON, {**ends(), **head(), **per_layer(_olmo2)}),
    "Olmo3ForCausalLM": (COMMON | {"sliding_window": 64}, {**ends(), **head(), **per_layer(_olmo2)}),
    "SeedOssForCausalLM": (COMMON, {**ends(), **head(), **per_layer(_qwen2)}),
    "Ernie4_5ForCausalLM": (COMMON, {**ends(), **per_layer(_llama)}),
    "Exaone4ForCausalLM": (COMMON | {"sliding_window": 64}, {**ends(), **head(), **per_layer(exaone4_layer)}),
    "GraniteForCausalLM": (COMMON | {"logits_scaling": 8.0}, {**ends(), **head(), **per_layer(_llama)}),
    "GraniteMoeSharedForCausalLM": (
        COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
        {**ends(), **head(), **per_layer(granitemoe_layer)},
    ),
    "Ernie4_5_MoeForCausalLM": (
        COMMON | ERNIE_MOE_KEYS,
        {**ends(), **per_layer(ernie_moe_layer), **ERNIE_PREDICTION},
    ),
    "HunYuanDenseV1ForCausalLM": (COMMON | {"head_dim": HEAD}, {**ends(), **head(), **per_layer(hunyuan_layer)}),
    "HunYuanMoEV1ForCausalLM": (COMMON | HUNYUAN_MOE_KEYS, {**ends(), **head(), **per_layer(hunyuan_moe_layer)}),
    "BailingMoeV2ForCausalLM": (COMMON | BAILING_KEYS, {**_BAILING_ENDS, **head(), **per_layer(bailing_layer)}),
    "MiniMaxM2ForCausalLM": (COMMON | MINIMAX_KEYS, {**ends(), **head(), **per_layer(minimax_layer)}),
    **LATENT_CASES,
    "Cohere2ForCausalLM": (
        COMMON | {"sliding_window": 64, "layer_norm_eps": 1e-5, "logit_scale": 0.25},
        {**ends(), **per_layer(cohere2_layer)},
    ),
    "GptOssForCausalLM": (
        COMMON | {"head_dim": HEAD, "sliding_window": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
        {**ends(), **head(), **per_layer(gpt_oss_layer)},
    ),
    "Glm4MoeForCausalLM": (
        COMMON | _GLM_MOE,
        {**ends(), **head(), **per_layer(_glm4moe), **_glm4moe(f"model.layers.{LAYERS}")},
    ),
    "Phi3ForCausalLM": (
        COMMON | {"original_max_position_embeddings": 128, "sliding_window": 200},
        {**ends(), **head(), **per_layer(_phi3)},
    ),
    "InternLM2ForCausalLM": (COMMON, {**_INTERN_ENDS, **per_layer(_internlm2)}),
    "GemmaForCausalLM": (COMMON | _GEMMA, {**ends(), **per_layer(_llama)}),
    "Gemma2ForCausalLM": (COMMON | _GEMMA, {**ends(), **per_layer(_gemma2)}),
    "Gemma3ForCausalLM": (COMMON | _GEMMA, {**ends(), **per_layer(_gemma3)}),
    "Gemma3nForCausalLM": (COMMON | GEMMA3N_KEYS, {**ends(), **gemma3n_ends(), **per_layer(gemma3n_layer)}),
    "Gemma4ForCausalLM experts": (COMMON | EXPERT_KEYS, {**ends(), **per_layer(partial(gemma4_layer, EXPERT_KEYS))}),
    "Gemma4ForCausalLM inputs": (
        COMMON | INPUT_KEYS,
        {**ends(), **gemma4_ends(), **per_layer(partial(gemma4_layer, INPUT_KEYS))},
    ),
    "FalconForCausalLM": (COMMON | _FALCON_KEYS, {**_FALCON_ENDS, **per_layer(_falcon, "transformer.h")}),
    "FalconForCausalLM 40b": (
        COMMON | _FALCON_KEYS,
        {**_FALCON_ENDS, **per_layer(lambda layer: _falcon(layer, ("ln_attn", "ln_mlp")), "transformer.h")},
    ),
    "Starcoder2ForCausalLM": (
        COMMON | {"norm_epsilon": 1e-5, "tie_word_embeddings": True},
        {**ends(), "model.norm.bias": (HIDDEN,), **per_layer(_starcoder2)},
    ),
    "GPT2LMHeadModel": (_GPT2_KEYS, {**_GPT2_ENDS, **per_layer(_gpt2, "h")}),
}


def checkpoint(case: str) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Returns the configuration and float32 tensors of a case, the same at each call."""
    config, shapes = CASES[case]
    return {"architectures": [case.split()[0]], **config}, {name: values(name, shape) for name, shape in shapes.items()}


def values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    result = generator.standard_normal(shape, np.float32)
    return result / np.float32(shape[-1] ** 0.5) if len(shape) > 1 else 1 + result / np.float32(10)
