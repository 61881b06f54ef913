"""Shapes of mixtures (gpt-oss, Granite, ERNIE 4.5, Hunyuan, Ling, MiniMax), and of EXAONE 4 and Cohere 2."""

from __future__ import annotations

from support.models.checkpoints.shapes import (
    HEAD,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    Shapes,
    attention_shapes,
    expert_shapes,
    gated_shapes,
    layer_norms,
)

ERNIE_MOE_KEYS = {
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
}
ERNIE_PREDICTION: Shapes = {"model.mtp_linear_proj.0.weight": (HIDDEN, 2 * HIDDEN)}


def exaone4_layer(layer: str) -> Shapes:
    norms: Shapes = {f"{layer}.post_{part}_layernorm.weight": (HIDDEN,) for part in ("attention", "feedforward")}
    norms |= {f"{layer}.self_attn.{part}_norm.weight": (HEAD,) for part in "qk"}
    return {**norms, **attention_shapes(layer), **gated_shapes(f"{layer}.mlp")}


def cohere2_layer(layer: str) -> Shapes:
    norm: Shapes = {f"{layer}.input_layernorm.weight": (HIDDEN,)}
    return {**norm, **attention_shapes(layer), **gated_shapes(f"{layer}.mlp")}


def granitemoe_layer(layer: str) -> Shapes:
    moe, shared = f"{layer}.block_sparse_moe", f"{layer}.shared_mlp"
    return {
        **layer_norms(layer),
        **attention_shapes(layer),
        f"{moe}.router.layer.weight": (4, HIDDEN),
        f"{moe}.input_linear.weight": (4, 2 * INNER, HIDDEN),
        f"{moe}.output_linear.weight": (4, HIDDEN, INNER),
        f"{shared}.input_linear.weight": (96, HIDDEN),
        f"{shared}.output_linear.weight": (HIDDEN, 48),
    }


def ernie_moe_layer(layer: str) -> Shapes:
    """Returns shapes of a layer; the first one is dense."""
    if layer.endswith(".0"):
        return {**layer_norms(layer), **attention_shapes(layer), **gated_shapes(f"{layer}.mlp")}
    bias: Shapes = {f"{layer}.mlp.moe_statics.e_score_correction_bias": (1, 4)}
    shared = gated_shapes(f"{layer}.mlp.shared_experts", 32)
    return {**layer_norms(layer), **attention_shapes(layer), **bias, **shared, **expert_shapes(layer)}


def gpt_oss_layer(layer: str) -> Shapes:
    attention = {**attention_shapes(layer, bias=True), f"{layer}.self_attn.o_proj.bias": (HIDDEN,)}
    experts = f"{layer}.mlp.experts"
    return {
        **layer_norms(layer),
        **attention,
        f"{layer}.self_attn.sinks": (HEADS,),
        f"{layer}.mlp.router.weight": (4, HIDDEN),
        f"{layer}.mlp.router.bias": (4,),
        f"{experts}.gate_up_proj": (4, HIDDEN, 2 * INNER),
        f"{experts}.gate_up_proj_bias": (4, 2 * INNER),
        f"{experts}.down_proj": (4, INNER, HIDDEN),
        f"{experts}.down_proj_bias": (4, HIDDEN),
    }


HUNYUAN_MOE_KEYS = {
    "num_experts": 4,
    "moe_topk": [2, 2],
    "moe_intermediate_size": [32, 32],
    "num_shared_expert": [1, 1],
}
BAILING_KEYS = {
    "head_dim": HEAD,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
MINIMAX_KEYS = {"head_dim": HEAD, "rotary_dim": HEAD // 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def hunyuan_layer(layer: str) -> Shapes:
    norms: Shapes = {f"{layer}.self_attn.{part}_layernorm.weight": (HEAD,) for part in ("query", "key")}
    return {**layer_norms(layer), **attention_shapes(layer), **norms, **gated_shapes(f"{layer}.mlp")}


def hunyuan_moe_layer(layer: str) -> Shapes:
    shapes = {name: shape for name, shape in hunyuan_layer(layer).items() if ".mlp." not in name}
    shapes |= {**expert_shapes(layer), **gated_shapes(f"{layer}.mlp.shared_mlp")}
    shapes[f"{layer}.mlp.gate.wg.weight"] = shapes.pop(f"{layer}.mlp.gate.weight")
    return shapes


def bailing_layer(layer: str) -> Shapes:
    """Returns shapes of a layer; the first one is dense."""
    attention = f"{layer}.attention"
    shapes = {
        **layer_norms(layer),
        f"{attention}.query_key_value.weight": ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
        f"{attention}.dense.weight": (HIDDEN, HEADS * HEAD),
        **{f"{attention}.{part}_layernorm.weight": (HEAD,) for part in ("query", "key")},
    }
    if layer.endswith(".0"):
        return {**shapes, **gated_shapes(f"{layer}.mlp")}
    shapes |= {**expert_shapes(layer), **gated_shapes(f"{layer}.mlp.shared_experts", 32)}
    return {**shapes, f"{layer}.mlp.gate.expert_bias": (4,)}


def minimax_layer(layer: str) -> Shapes:
    mixture = f"{layer}.block_sparse_moe"
    shapes = {**layer_norms(layer), **attention_shapes(layer), f"{mixture}.gate.weight": (4, HIDDEN)}
    shapes |= {
        f"{layer}.self_attn.{part}_norm.weight": (heads * HEAD,) for part, heads in (("q", HEADS), ("k", KV_HEADS))
    }
    for expert in range(4):
        shapes |= {f"{mixture}.experts.{expert}.{name}.weight": (INNER, HIDDEN) for name in ("w1", "w3")}
        shapes[f"{mixture}.experts.{expert}.w2.weight"] = (HIDDEN, INNER)
    return {**shapes, f"{mixture}.e_score_correction_bias": (4,)}
