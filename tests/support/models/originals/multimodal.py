"""Text models of multimodal checkpoints: Llama 4, Qwen 3 VL, LFM2-VL."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from support.models.originals.original import Original, keys, rope

_LLAMA4 = keys(
    num_hidden_layers=5,
    intermediate_size_mlp=80,
    num_local_experts=6,
    num_experts_per_tok=2,
    attention_chunk_size=7,
    head_dim=32,
)
_LLAMA3_ROPE = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
_LLAMA4_VISION = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN3_VL = keys(
    head_dim=32,
    attention_bias=False,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 5000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
)
_QWEN3_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 1,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_patches": 16,
    "patch_size": 4,
}
_LFM2 = keys(model_type="lfm2", layer_types=["conv", "full_attention", "conv"], block_multiple_of=16)

MULTIMODAL_ORIGINALS: Mapping[str, Original] = MappingProxyType(
    {
        "llama4": Original("Llama4ForCausalLM", _LLAMA4 | _LLAMA3_ROPE),
        "llama4-plain": Original(
            "Llama4ForCausalLM",
            _LLAMA4
            | {
                "num_local_experts": 128,
                "use_qk_norm": False,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 8192,
                "intermediate_size": 32,
            },
        ),
        "llama4-pictures": Original(
            "Llama4ForConditionalGeneration",
            {"text_config": _LLAMA4 | {"no_rope_layers": [1, 0, 1, 1, 0]}, "vision_config": _LLAMA4_VISION},
        ),
        "qwen3vl": Original(
            "Qwen3VLForConditionalGeneration",
            {"text_config": _QWEN3_VL | {"tie_word_embeddings": True}, "vision_config": _QWEN3_VISION},
        ),
        "qwen3vlmoe": Original(
            "Qwen3VLMoeForConditionalGeneration",
            {
                "text_config": _QWEN3_VL
                | {
                    "num_experts": 6,
                    "num_experts_per_tok": 3,
                    "moe_intermediate_size": 32,
                    "tie_word_embeddings": False,
                },
                "vision_config": _QWEN3_VISION,
                "tie_word_embeddings": False,
            },
        ),
        "lfm2-pictures": Original("Lfm2VlForConditionalGeneration", {"text_config": _LFM2, "vision_config": _SIGLIP}),
    }
)
