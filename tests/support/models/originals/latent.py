"""Models with latent attention."""

from __future__ import annotations

from typing import Any

from support.models.originals.original import Original, keys, rope, without

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
    "model_type": "pixtral",
    "head_dim": 16,
}


def _latent(query_rank: int | None, **more: Any) -> dict[str, Any]:
    widths = {
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": query_rank,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "rms_norm_eps": 1e-6,
    }
    return keys(**(widths | more))


def _yarn(share: float, **more: Any) -> dict[str, Any]:
    return rope(
        "yarn",
        factor=40.0,
        original_max_position_embeddings=16,
        beta_fast=8.0,
        beta_slow=0.5,
        mscale=share,
        mscale_all_dim=share,
        **more,
    )


_MISTRAL4 = {"n_shared_experts": 1, "norm_topk_prob": True, "max_position_embeddings": 640}

LATENT_ORIGINALS = {
    "deepseek-v2": Original(
        "DeepseekV2ForCausalLM",
        _latent(48, n_shared_experts=2, first_k_dense_replace=1, routed_scaling_factor=4.0, **rope("default")),
    ),
    "deepseek-v2-lite": Original(
        "DeepseekV2ForCausalLM", _latent(None, n_shared_experts=1, first_k_dense_replace=1, **_yarn(0.707))
    ),
    "deepseek-v3": Original(
        "DeepseekV3ForCausalLM",
        _latent(
            48,
            n_shared_experts=1,
            first_k_dense_replace=2,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            **_yarn(1.0),
        ),
    ),
    "glm4-moe-lite": Original(
        "Glm4MoeLiteForCausalLM",
        _latent(40, n_shared_experts=1, n_group=1, topk_group=1, routed_scaling_factor=1.8, **rope("default")),
    ),
    "mistral4": Original("Mistral4ForCausalLM", _latent(48, **_MISTRAL4, **_yarn(1.0, llama_4_scaling_beta=0.1))),
    "mistral4-magnitudes": Original(
        "Mistral4ForCausalLM",
        _latent(None, **_MISTRAL4, n_group=2, topk_group=1, **_yarn(0.5, llama_4_scaling_beta=0.3)),
    ),
    "mistral4-pictures": Original(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": _latent(
                48, model_type="mistral4", **_MISTRAL4, **_yarn(1.0, llama_4_scaling_beta=0.1), num_experts_per_tok=8
            ),
            "vision_config": _VISION,
            "tie_word_embeddings": False,
        },
    ),
    "kimi-linear": Original(
        "KimiLinearForCausalLM",
        without(
            _latent(
                None,
                num_hidden_layers=4,
                num_local_experts=8,
                n_shared_experts=1,
                linear_head_dim=16,
                linear_num_heads=4,
                layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
            ),
            "n_routed_experts",
        ),
    ),
}
