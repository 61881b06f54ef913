"""Shapes of a tiny Gemma 3n, and an unusual configuration for transformers' class."""

from __future__ import annotations

from typing import Any

from support.models.checkpoints.shapes import HEAD, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, WORDS, Shapes, gated_shapes

_COPIES, _RANK, _INPUT = 3, 24, 16
GEMMA3N_KEYS: dict[str, Any] = {
    "head_dim": HEAD,
    "sliding_window": 64,
    "layer_types": ["full_attention"] * LAYERS,
    "num_kv_shared_layers": 1,
    "vocab_size_per_layer_input": WORDS,
    "hidden_size_per_layer_input": _INPUT,
    "laurel_rank": _RANK,
    "altup_num_inputs": _COPIES,
    "activation_sparsity_pattern": [0.9] + [0.0] * (LAYERS - 1),
}
ORIGINAL_KEYS: dict[str, Any] = {
    "num_hidden_layers": 7,
    "head_dim": 16,
    "vocab_size_per_layer_input": 300,
    "hidden_size_per_layer_input": 32,
    "laurel_rank": 24,
    "altup_active_idx": 1,
    "altup_num_inputs": 3,
    "num_kv_shared_layers": 2,
    "sliding_window": 6,
    "layer_types": [*["sliding_attention", "sliding_attention", "full_attention"] * 2, "sliding_attention"],
    "activation_sparsity_pattern": [0.9, 0.3, 0.0, 0.8, 0.0, 0.5, 0.0],
    "intermediate_size": [96, 64, 96, 96, 128, 96, 96],
    "final_logit_softcapping": 4.0,
}
_PROJECTIONS = ("altup_projections", "altup_unembed_projections")
_NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")


def gemma3n_ends() -> Shapes:
    """Returns shapes of tensors outside of layers, except the embedding and the output norm."""
    matrices = [f"model.{name}.{copy}" for name in _PROJECTIONS for copy in range(_COPIES - 1)]
    return {
        "model.embed_tokens_per_layer.weight": (WORDS, LAYERS * _INPUT),
        "model.per_layer_model_projection.weight": (LAYERS * _INPUT, HIDDEN),
        "model.per_layer_projection_norm.weight": (_INPUT,),
        **{f"{name}.weight": (HIDDEN, HIDDEN) for name in matrices},
    }


def gemma3n_layer(layer: str) -> Shapes:
    attention, altup, laurel = f"{layer}.self_attn", f"{layer}.altup", f"{layer}.laurel"
    shapes: Shapes = {f"{layer}.{norm}_layernorm.weight": (HIDDEN,) for norm in _NORMS}
    shapes |= {f"{attention}.q_proj.weight": (HEADS * HEAD, HIDDEN), f"{attention}.q_norm.weight": (HEAD,)}
    shapes |= {f"{attention}.o_proj.weight": (HIDDEN, HEADS * HEAD)}
    if layer != f"model.layers.{LAYERS - 1}":
        shapes |= {f"{attention}.{part}_proj.weight": (KV_HEADS * HEAD, HIDDEN) for part in "kv"}
        shapes |= {f"{attention}.k_norm.weight": (HEAD,)}
    return {
        **shapes,
        **gated_shapes(f"{layer}.mlp", INNER),
        f"{altup}.modality_router.weight": (_COPIES, HIDDEN),
        f"{altup}.router_norm.weight": (HIDDEN,),
        f"{altup}.prediction_coefs.weight": (_COPIES**2, _COPIES),
        f"{altup}.correction_coefs.weight": (_COPIES, _COPIES),
        f"{altup}.correct_output_scale": (HIDDEN,),
        f"{laurel}.linear_left.weight": (_RANK, HIDDEN),
        f"{laurel}.linear_right.weight": (HIDDEN, _RANK),
        f"{laurel}.post_laurel_norm.weight": (HIDDEN,),
        f"{layer}.per_layer_input_gate.weight": (_INPUT, HIDDEN),
        f"{layer}.per_layer_projection.weight": (HIDDEN, _INPUT),
        f"{layer}.post_per_layer_input_norm.weight": (HIDDEN,),
    }
