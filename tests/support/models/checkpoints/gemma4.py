"""Shapes of a tiny Gemma 4: one layer with a window and one without, with experts or with per-layer inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.models.checkpoints.shapes import HEAD, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, WORDS, Shapes, gated_shapes

FULL_HEAD, INPUT, COUNT, EXPERT = 32, 16, 4, 32
_KEYS: dict[str, Any] = {
    "head_dim": HEAD,
    "global_head_dim": FULL_HEAD,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
}
EXPERT_KEYS = _KEYS | {
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": COUNT,
    "top_k_experts": 2,
    "moe_intermediate_size": EXPERT,
}
INPUT_KEYS = _KEYS | {
    "hidden_size_per_layer_input": INPUT,
    "layer_types": ["full_attention"] * LAYERS,
    "num_kv_shared_layers": 1,
    "use_double_wide_mlp": True,
}
_NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")


def gemma4_layer(keys: Mapping[str, Any], layer: str) -> Shapes:
    number = int(layer.rpartition(".")[2])
    is_full, is_last = keys["layer_types"][number] == "full_attention", number == LAYERS - 1
    width = FULL_HEAD if is_full else HEAD
    kv_heads = keys.get("num_global_key_value_heads", KV_HEADS) if is_full else KV_HEADS
    attention = f"{layer}.self_attn"
    shapes: Shapes = {f"{layer}.{norm}_layernorm.weight": (HIDDEN,) for norm in _NORMS}
    shapes |= {f"{attention}.q_proj.weight": (HEADS * width, HIDDEN), f"{attention}.q_norm.weight": (width,)}
    shapes |= {f"{attention}.o_proj.weight": (HIDDEN, HEADS * width), f"{layer}.layer_scalar": (1,)}
    if not (is_last and keys.get("num_kv_shared_layers")):
        shapes |= {f"{attention}.k_proj.weight": (kv_heads * width, HIDDEN), f"{attention}.k_norm.weight": (width,)}
        if not (is_full and keys.get("attention_k_eq_v")):
            shapes[f"{attention}.v_proj.weight"] = (kv_heads * width, HIDDEN)
    shapes |= gated_shapes(f"{layer}.mlp", 2 * INNER if is_last and keys.get("use_double_wide_mlp") else INNER)
    return shapes | (_experts(layer) if "num_experts" in keys else _input(layer))


def gemma4_ends() -> Shapes:
    """Returns shapes of the tensors that per-layer inputs are computed from."""
    return {
        "model.embed_tokens_per_layer.weight": (WORDS, LAYERS * INPUT),
        "model.per_layer_model_projection.weight": (LAYERS * INPUT, HIDDEN),
        "model.per_layer_projection_norm.weight": (INPUT,),
    }


def _experts(layer: str) -> Shapes:
    norms = ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2")
    return {
        **{f"{layer}.{norm}.weight": (HIDDEN,) for norm in norms},
        f"{layer}.router.proj.weight": (COUNT, HIDDEN),
        f"{layer}.router.scale": (HIDDEN,),
        f"{layer}.router.per_expert_scale": (COUNT,),
        f"{layer}.experts.gate_up_proj": (COUNT, 2 * EXPERT, HIDDEN),
        f"{layer}.experts.down_proj": (COUNT, HIDDEN, EXPERT),
    }


def _input(layer: str) -> Shapes:
    return {
        f"{layer}.per_layer_input_gate.weight": (INPUT, HIDDEN),
        f"{layer}.per_layer_projection.weight": (HIDDEN, INPUT),
        f"{layer}.post_per_layer_input_norm.weight": (HIDDEN,),
    }
