"""Sizes and settings of the tiny random checkpoints, and tensor shapes that many architectures share."""

from __future__ import annotations

from collections.abc import Callable

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, WORDS, LAYERS = 64, 4, 2, 16, 96, 320, 2
Shapes = dict[str, tuple[int, ...]]


COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": WORDS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def ends(**more: tuple[int, ...]) -> Shapes:
    return {"model.embed_tokens.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,), **more}


def head() -> Shapes:
    return {"lm_head.weight": (WORDS, HIDDEN)}


def per_layer(make: Callable[[str], Shapes], prefix: str = "model.layers") -> Shapes:
    return {name: shape for layer in range(LAYERS) for name, shape in make(f"{prefix}.{layer}").items()}


def layer_norms(layer: str) -> Shapes:
    return {f"{layer}.input_layernorm.weight": (HIDDEN,), f"{layer}.post_attention_layernorm.weight": (HIDDEN,)}


def attention_shapes(layer: str, bias: bool = False) -> Shapes:
    query, key = HEADS * HEAD, KV_HEADS * HEAD
    rows = {"q_proj": query, "k_proj": key, "v_proj": key}
    shapes: Shapes = {f"{layer}.self_attn.{name}.weight": (count, HIDDEN) for name, count in rows.items()}
    if bias:
        shapes |= {f"{layer}.self_attn.{name}.bias": (count,) for name, count in rows.items()}
    return shapes | {f"{layer}.self_attn.o_proj.weight": (HIDDEN, query)}


def gated_shapes(prefix: str, width: int = INNER) -> Shapes:
    inner = {f"{prefix}.{part}_proj.weight": (width, HIDDEN) for part in ("gate", "up")}
    return {**inner, f"{prefix}.down_proj.weight": (HIDDEN, width)}


def expert_shapes(layer: str) -> Shapes:
    shapes: Shapes = {f"{layer}.mlp.gate.weight": (4, HIDDEN)}
    for expert in range(4):
        shapes |= gated_shapes(f"{layer}.mlp.experts.{expert}", 32)
    return shapes
