"""Shapes of models with latent attention: DeepSeek V2 and V3, GLM-4.7-Flash, Mistral Small 4, Kimi Linear. The first
layer has no experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.models.checkpoints.shapes import (
    COMMON,
    HEADS,
    HIDDEN,
    LAYERS,
    WORDS,
    Shapes,
    ends,
    expert_shapes,
    gated_shapes,
    head,
    layer_norms,
    per_layer,
)

RANK, ROTATED, PLAIN, VALUE, QUERY_RANK, COUNT, EXPERT, DELTA, TAPS = 32, 8, 24, 40, 48, 4, 32, 16, 4
_KEYS: dict[str, Any] = COMMON | {
    "num_key_value_heads": HEADS,
    "kv_lora_rank": RANK,
    "q_lora_rank": QUERY_RANK,
    "qk_rope_head_dim": ROTATED,
    "qk_nope_head_dim": PLAIN,
    "v_head_dim": VALUE,
    "n_routed_experts": COUNT,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT,
    "first_k_dense_replace": 1,
}
_KIMI: dict[str, Any] = _KEYS | {
    "q_lora_rank": None,
    "num_experts": COUNT,
    "num_shared_experts": 1,
    "num_experts_per_token": 2,
    "linear_attn_config": {
        "full_attn_layers": [2],
        "kda_layers": [1],
        "head_dim": DELTA,
        "num_heads": HEADS,
        "short_conv_kernel_size": TAPS,
    },
}


def _attention(layer: str, query_rank: int) -> Shapes:
    source, queries = f"{layer}.self_attn", HEADS * (PLAIN + ROTATED)
    shapes: Shapes = {
        f"{source}.kv_a_proj_with_mqa.weight": (RANK + ROTATED, HIDDEN),
        f"{source}.kv_a_layernorm.weight": (RANK,),
        f"{source}.kv_b_proj.weight": (HEADS * (PLAIN + VALUE), RANK),
        f"{source}.o_proj.weight": (HIDDEN, HEADS * VALUE),
    }
    if not query_rank:
        return {**shapes, f"{source}.q_proj.weight": (queries, HIDDEN)}
    shapes |= {f"{source}.q_a_proj.weight": (query_rank, HIDDEN), f"{source}.q_a_layernorm.weight": (query_rank,)}
    return {**shapes, f"{source}.q_b_proj.weight": (queries, query_rank)}


def _layer(layer: str, query_rank: int = QUERY_RANK, *, bias: bool = False, fused: bool = False) -> Shapes:
    shapes = {**layer_norms(layer), **_attention(layer, query_rank)}
    if layer.endswith(".0"):
        return {**shapes, **gated_shapes(f"{layer}.mlp")}
    shapes |= {**expert_shapes(layer), **gated_shapes(f"{layer}.mlp.shared_experts", EXPERT)}
    if fused:
        shapes = {name: shape for name, shape in shapes.items() if ".mlp.experts." not in name}
        shapes[f"{layer}.mlp.experts.gate_up_proj"] = (COUNT, 2 * EXPERT, HIDDEN)
        shapes[f"{layer}.mlp.experts.down_proj"] = (COUNT, HIDDEN, EXPERT)
    if bias:
        shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (COUNT,)
    return shapes


def _v3(layer: str) -> Shapes:
    return _layer(layer, bias=True)


def _glm(layer: str) -> Shapes:
    """Returns shapes of a layer or, after the last one, of the MTP head."""
    shapes = _layer(layer, bias=True)
    if layer.endswith(f".{LAYERS}"):
        shapes |= {f"{layer}.{norm}.weight": (HIDDEN,) for norm in ("enorm", "hnorm", "shared_head.norm")}
        shapes |= {f"{layer}.{name}.weight": (WORDS, HIDDEN) for name in ("embed_tokens", "shared_head.head")}
        shapes[f"{layer}.eh_proj.weight"] = (HIDDEN, 2 * HIDDEN)
    return shapes


def _kimi(layer: str) -> Shapes:
    """Returns a delta net without experts (first layer), or attention with experts."""
    if not layer.endswith(".0"):
        mixture = _layer(layer, 0, bias=True)
        return {name.replace(".mlp.", ".block_sparse_moe."): shape for name, shape in _numbered(mixture).items()}
    net, inner = f"{layer}.self_attn", HEADS * DELTA
    shapes: Shapes = {**layer_norms(layer), **gated_shapes(f"{layer}.mlp")}
    shapes |= {f"{net}.{part}_proj.weight": (inner, HIDDEN) for part in "qkv"}
    shapes |= {f"{net}.{part}_conv1d.weight": (inner, 1, TAPS) for part in "qkv"}
    shapes |= {f"{net}.{part}_a_proj.weight": (DELTA, HIDDEN) for part in "fg"}
    shapes |= {f"{net}.{part}_b_proj.weight": (inner, DELTA) for part in "fg"}
    shapes |= {f"{net}.b_proj.weight": (HEADS, HIDDEN), f"{net}.o_proj.weight": (HIDDEN, inner)}
    shapes |= {f"{net}.A_log": (1, 1, HEADS, 1), f"{net}.dt_bias": (inner,), f"{net}.o_norm.weight": (DELTA,)}
    return shapes


def _numbered(shapes: Shapes) -> Shapes:
    """Replaces the names of experts' matrices with w1, w2 and w3."""
    for number, part in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        moved = [name for name in shapes if ".experts." in name and f".{part}_proj." in name]
        shapes |= {name.replace(f"{part}_proj", number): shapes.pop(name) for name in moved}
    return shapes


def _case(config: dict[str, Any], make: Callable[[str], Shapes]) -> tuple[dict[str, Any], Shapes]:
    return config, {**ends(), **head(), **per_layer(make)}


LATENT_CASES: dict[str, tuple[dict[str, Any], Shapes]] = {
    "DeepseekV2ForCausalLM": _case(_KEYS | {"q_lora_rank": None}, lambda layer: _layer(layer, 0)),
    "DeepseekV3ForCausalLM": _case(_KEYS | {"n_group": 2, "topk_group": 1}, _v3),
    "Glm4MoeLiteForCausalLM": (
        _KEYS | {"num_nextn_predict_layers": 1},
        {**ends(), **head(), **per_layer(_glm), **_glm(f"model.layers.{LAYERS}")},
    ),
    "Mistral4ForCausalLM": _case(_KEYS, lambda layer: _layer(layer, fused=True)),
    "KimiLinearForCausalLM": _case(_KIMI, _kimi),
}
