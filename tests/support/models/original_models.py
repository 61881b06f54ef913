"""Small models computed by transformers' own classes: their configurations, and weights drawn for the tensor names and
shapes of transformers."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.models.checkpoint_files import write_hugging_face
from support.models.checkpoints.gemma3n import ORIGINAL_KEYS
from support.models.originals.latent import LATENT_ORIGINALS
from support.models.originals.mixtures import MIXTURE_ORIGINALS
from support.models.originals.multimodal import MULTIMODAL_ORIGINALS
from support.models.originals.original import Original, keys, rope, without
from support.models.originals.recurrent import RECURRENT_ORIGINALS
from support.models.tiny_architectures import TOKENS, VOCABULARY
from support.paths import DATA

DATA_FOLDER = DATA / "originals"
SEED = 1
Shapes = Mapping[str, tuple[int, ...]]


_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_DELTA_NET = {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
}
_GRANITE_MOE = {"num_local_experts": 6, "num_experts_per_tok": 3}
_GEMMA = {"head_dim": 32, "num_key_value_heads": 1}
_GEMMA2 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 6}
_GEMMA4 = {
    "num_hidden_layers": 6,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 6,
    "hidden_size_per_layer_input": 0,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 20000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
    },
}
_LONG = {"long_factor": [1.5, 2.0, 3.0, 4.5, 5.0, 6.0], "short_factor": [1.1, 1.2, 1.3, 1.2, 1.4, 1.6]}
_TWO_ROTATIONS = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 20000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
    }
}
_OLMO3_ROTATIONS = {
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn",
            "factor": 8.0,
            "rope_theta": 20000.0,
            "original_max_position_embeddings": 32,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    }
}
_MINISTRAL = rope(
    "yarn",
    factor=16.0,
    original_max_position_embeddings=8,
    max_position_embeddings=256,
    beta_fast=4.0,
    beta_slow=0.5,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
)
_GPT_OSS = keys(
    num_local_experts=6,
    num_experts_per_tok=3,
    head_dim=32,
    sliding_window=6,
    **rope("yarn", factor=8.0, original_max_position_embeddings=64, beta_fast=9.0, beta_slow=0.7, truncate=False),
)
_FALCON = without(keys(), "num_key_value_heads", "intermediate_size")
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}

MODELS: Mapping[str, Original] = MappingProxyType(
    {
        "llama-biases": Original(
            "LlamaForCausalLM",
            keys(head_dim=24, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-3),
        ),
        "llama-linear": Original("LlamaForCausalLM", keys(**rope("linear", factor=4.0))),
        "llama-llama3": Original(
            "LlamaForCausalLM",
            keys(
                **rope(
                    "llama3",
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=64,
                )
            ),
        ),
        "llama-yarn": Original(
            "LlamaForCausalLM", keys(**rope("yarn", factor=4.0, original_max_position_embeddings=64))
        ),
        "llama-yarn-factor": Original(
            "LlamaForCausalLM",
            keys(
                **rope(
                    "yarn",
                    factor=8.0,
                    original_max_position_embeddings=32,
                    attention_factor=1.4,
                    beta_fast=6.0,
                    beta_slow=0.5,
                )
            ),
        ),
        "llama-yarn-shares": Original(
            "LlamaForCausalLM",
            keys(**rope("yarn", factor=16.0, original_max_position_embeddings=16, mscale=1.9, mscale_all_dim=0.3)),
        ),
        "llama-dynamic": Original("LlamaForCausalLM", keys(**rope("dynamic", factor=4.0))),
        "mistral": Original("MistralForCausalLM", keys(head_dim=32, sliding_window=6)),
        "mixtral": Original("MixtralForCausalLM", keys(num_local_experts=6, num_experts_per_tok=3, sliding_window=9)),
        "qwen2": Original("Qwen2ForCausalLM", keys(tie_word_embeddings=True, sliding_window=4)),
        "qwen2moe": Original(
            "Qwen2MoeForCausalLM", keys(**_MOE, shared_expert_intermediate_size=80, norm_topk_prob=False)
        ),
        "qwen3": Original("Qwen3ForCausalLM", keys(head_dim=32, attention_bias=True, tie_word_embeddings=True)),
        "qwen3moe": Original("Qwen3MoeForCausalLM", keys(**_MOE, head_dim=32, norm_topk_prob=True)),
        "qwen3next": Original("Qwen3NextForCausalLM", keys(**_DELTA_NET, **_MOE, shared_expert_intermediate_size=48)),
        "qwen35": Original("Qwen3_5ForCausalLM", keys(**_DELTA_NET)),
        "qwen35moe": Original("Qwen3_5MoeForCausalLM", keys(**_DELTA_NET, **_MOE, shared_expert_intermediate_size=48)),
        "qwen35-pictures": Original(
            "Qwen3_5ForConditionalGeneration",
            {
                "text_config": keys(**_DELTA_NET),
                "vision_config": {
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 1,
                    "patch_size": 4,
                    "out_hidden_size": 64,
                    "num_position_embeddings": 16,
                },
            },
        ),
        "phi3": Original("Phi3ForCausalLM", keys(partial_rotary_factor=0.75, sliding_window=7)),
        "phi3-short": Original(
            "Phi3ForCausalLM",
            keys(original_max_position_embeddings=64, partial_rotary_factor=0.75, **rope("longrope", **_LONG)),
            context=64,
        ),
        "phi3-long": Original(
            "Phi3ForCausalLM",
            keys(original_max_position_embeddings=16, partial_rotary_factor=0.75, **rope("longrope", **_LONG)),
        ),
        "gemma": Original("GemmaForCausalLM", keys(**_GEMMA, **rope("default"))),
        "gemma2": Original(
            "Gemma2ForCausalLM",
            keys(
                **_GEMMA2,
                **rope("default"),
                num_hidden_layers=4,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=4.0,
            ),
        ),
        "gemma3": Original("Gemma3ForCausalLM", keys(**_GEMMA2, **_TWO_ROTATIONS, num_hidden_layers=7)),
        "gemma3-layers": Original(
            "Gemma3ForCausalLM",
            keys(**_GEMMA2, layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
        ),
        "gemma3-pictures": Original(
            "Gemma3ForConditionalGeneration",
            {"text_config": keys(**_GEMMA2, **_TWO_ROTATIONS), "vision_config": _VISION, "mm_tokens_per_image": 4},
        ),
        "gemma3n": Original("Gemma3nForCausalLM", keys(**ORIGINAL_KEYS)),
        "gemma4": Original(
            "Gemma4ForCausalLM",
            keys(**_GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=1, final_logit_softcapping=4.0),
        ),
        "gemma4-experts": Original(
            "Gemma4ForCausalLM",
            keys(**_GEMMA4, enable_moe_block=True, num_experts=6, top_k_experts=3, moe_intermediate_size=48),
        ),
        "gemma4-inputs": Original(
            "Gemma4ForCausalLM",
            keys(
                **_GEMMA4
                | {
                    "hidden_size_per_layer_input": 32,
                    "vocab_size_per_layer_input": VOCABULARY,
                    "num_kv_shared_layers": 3,
                    "use_double_wide_mlp": True,
                    "layer_types": ["sliding_attention", "full_attention"] * 3,
                },
            ),
        ),
        "gemma4-pictures": Original(
            "Gemma4ForConditionalGeneration",
            {"text_config": keys(**_GEMMA4), "vision_config": _VISION | {"head_dim": 16}, "audio_config": None},
        ),
        "falcon": Original("FalconForCausalLM", {**_FALCON, **rope("default")}),
        "falcon-apart": Original("FalconForCausalLM", {**_FALCON, "multi_query": False, "ffn_hidden_size": 160}),
        "falcon-two-norms": Original(
            "FalconForCausalLM",
            {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
        ),
        "smollm3": Original("SmolLM3ForCausalLM", keys(num_hidden_layers=5, attention_bias=True)),
        "ministral3": Original("Ministral3ForCausalLM", keys(head_dim=32, **_MINISTRAL)),
        "ministral3-magnitudes": Original(
            "Ministral3ForCausalLM",
            keys(
                head_dim=16,
                **rope(
                    "yarn",
                    factor=8.0,
                    original_max_position_embeddings=16,
                    mscale=1.5,
                    mscale_all_dim=0.5,
                    llama_4_scaling_beta=0.3,
                ),
            ),
        ),
        "mistral3-pictures": Original(
            "Mistral3ForConditionalGeneration",
            {
                "text_config": keys(model_type="mistral", head_dim=32, tie_word_embeddings=False),
                "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
                "tie_word_embeddings": False,
            },
        ),
        "olmo2": Original("Olmo2ForCausalLM", keys()),
        "olmo3": Original("Olmo3ForCausalLM", keys(**_OLMO3_ROTATIONS, num_hidden_layers=5, sliding_window=6)),
        "seed_oss": Original("SeedOssForCausalLM", keys(head_dim=32)),
        "ernie4_5": Original("Ernie4_5ForCausalLM", keys(head_dim=32, **rope("default"))),
        "exaone4": Original("Exaone4ForCausalLM", keys(num_hidden_layers=5, sliding_window=6)),
        "exaone4-plain": Original("Exaone4ForCausalLM", keys(sliding_window=None, layer_types=["full_attention"] * 3)),
        "granite": Original(
            "GraniteForCausalLM",
            keys(embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.7, logits_scaling=2.5),
        ),
        "granitemoe": Original("GraniteMoeForCausalLM", keys(**_GRANITE_MOE, residual_multiplier=0.7)),
        "granitemoe-shared": Original(
            "GraniteMoeSharedForCausalLM",
            keys(**_GRANITE_MOE, embedding_multiplier=3.0, logits_scaling=0.5, shared_intermediate_size=48),
        ),
        "ernie4_5-moe": Original(
            "Ernie4_5_MoeForCausalLM",
            keys(
                moe_num_experts=6,
                moe_k=3,
                moe_intermediate_size=32,
                moe_num_shared_experts=2,
                moe_layer_start_index=1,
                **rope("default"),
            ),
        ),
        "cohere2": Original("Cohere2ForCausalLM", keys(num_hidden_layers=5, sliding_window=6, logit_scale=0.5)),
        "starcoder2": Original("Starcoder2ForCausalLM", keys(sliding_window=6)),
        "gpt2": Original(
            "GPT2LMHeadModel",
            {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96},
            context=64,
        ),
        "gpt-oss": Original("GptOssForCausalLM", _GPT_OSS),
        "gpt-oss-mxfp4": Original("GptOssForCausalLM", _GPT_OSS, packed=True),
        "glm4moe": Original(
            "Glm4MoeForCausalLM",
            keys(
                head_dim=32,
                attention_bias=True,
                use_qk_norm=True,
                n_routed_experts=6,
                n_shared_experts=1,
                num_experts_per_tok=3,
                moe_intermediate_size=32,
                routed_scaling_factor=1.5,
                num_nextn_predict_layers=0,
            ),
        ),
        "glm4moe-plain": Original(
            "Glm4MoeForCausalLM",
            keys(
                head_dim=16,
                n_routed_experts=8,
                n_shared_experts=2,
                num_experts_per_tok=2,
                moe_intermediate_size=48,
                norm_topk_prob=False,
                first_k_dense_replace=0,
                num_nextn_predict_layers=0,
            ),
        ),
        "glm": Original("GlmForCausalLM", keys(head_dim=32, **rope("default", partial_rotary_factor=0.5))),
        "glm4": Original("Glm4ForCausalLM", keys(head_dim=16, attention_bias=True)),
        **LATENT_ORIGINALS,
        **RECURRENT_ORIGINALS,
        **MULTIMODAL_ORIGINALS,
        **MIXTURE_ORIGINALS,
    }
)


def draw(name: str, shape: tuple[int, ...], seed: int) -> NDArray[Any]:
    """Draws one tensor, the same on every machine and so far from neutral that tests fail without it."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("_blocks"):
        return generator.integers(0, 256, shape, np.uint8)
    if name.endswith("_scales"):
        return generator.integers(121, 125, shape, np.uint8)  # exponents with a bias of 127
    numbers = generator.standard_normal(shape, np.float32)
    if len(shape) == 1:
        return np.float32(0.3) * numbers + np.float32("bias" not in name)
    if any(part in name for part in ("embed", "wte", "wpe")):
        return np.float32(0.5) * numbers
    sharp = any(part in name for part in ("q_proj", "k_proj", "qkv", "c_attn", "query_key_value", "gate.weight"))
    return np.float32((1.2 if sharp else 1.0) / shape[-1] ** 0.5) * numbers


def write_original(folder: Path, config: Mapping[str, Any], shapes: Shapes, seed: int) -> Path:
    """Writes a checkpoint in Hugging Face's form without a tokenizer."""
    return write_hugging_face(folder, config, {name: draw(name, shape, seed) for name, shape in shapes.items()})


def packed_form(config: dict[str, Any], shapes: Shapes) -> tuple[dict[str, Any], Shapes]:
    """Returns configuration and shapes with experts in MXFP4: [experts, columns, rows] becomes blocks of 32 columns."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            count, columns, rows = shape
            found |= {
                f"{name}_blocks": (count, rows, columns // 32, 16),
                f"{name}_scales": (count, rows, columns // 32),
            }
        else:
            found[name] = shape
    return config | {"quantization_config": {"quant_method": "mxfp4"}}, found


def recorded_form(name: str) -> tuple[dict[str, Any], Shapes]:
    """Returns the configuration and the tensor shapes that transformers wrote for one of MODELS."""
    said = json.loads((DATA_FOLDER / f"{name}.json").read_text())
    return said["config"], {tensor: tuple(shape) for tensor, shape in said["tensors"].items()}


def recorded_logits(name: str) -> NDArray[np.float32]:
    """Returns the recorded logits, [tokens, vocabulary]."""
    return np.fromfile(DATA_FOLDER / f"{name}.f16", "<f2").astype(np.float32).reshape(len(TOKENS), VOCABULARY)
