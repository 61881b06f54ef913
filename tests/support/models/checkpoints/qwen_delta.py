"""Shapes of Qwen 3 Next and Qwen 3.5: a layer with a delta net, one with gated attention, and an MTP head."""

from __future__ import annotations

from typing import Any

from support.models.checkpoints.shapes import HEAD, HEADS, HIDDEN, KV_HEADS, LAYERS, Shapes, gated_shapes, layer_norms

KEY_HEADS, VALUE_HEADS, WIDTH, TAPS, COUNT, EXPERT, SHARED = 2, 4, 16, 4, 4, 32, 48
VALUES = VALUE_HEADS * WIDTH
CHANNELS = 2 * KEY_HEADS * WIDTH + VALUES
DELTA_KEYS: dict[str, Any] = {
    "head_dim": HEAD,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": KEY_HEADS,
    "linear_num_value_heads": VALUE_HEADS,
    "linear_key_head_dim": WIDTH,
    "linear_value_head_dim": WIDTH,
    "linear_conv_kernel_dim": TAPS,
    "mtp_num_hidden_layers": 1,
    "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}
MOE_KEYS: dict[str, Any] = {
    "num_experts": COUNT,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT,
    "shared_expert_intermediate_size": SHARED,
}


def delta_layers(form: str) -> Shapes:
    """Returns shapes of all layers. `form` is next (fused products), dense, or moe (one matrix for all experts)."""
    shapes: Shapes = {}
    for number in range(LAYERS + 1):
        layer = f"model.layers.{number}" if number < LAYERS else "mtp.layers.0"
        shapes |= {**layer_norms(layer), **(_delta_net(layer, form) if number == 0 else _attention(layer))}
        shapes |= gated_shapes(f"{layer}.mlp") if form == "dense" else _experts(f"{layer}.mlp", form)
    shapes |= {f"mtp.{name}.weight": (HIDDEN,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    return shapes | {"mtp.fc.weight": (HIDDEN, 2 * HIDDEN)}


def _delta_net(layer: str, form: str) -> Shapes:
    net = f"{layer}.linear_attn"
    if form == "next":
        products = {"qkvz": CHANNELS + VALUES, "ba": 2 * VALUE_HEADS}
    else:
        products = {"qkv": CHANNELS, "z": VALUES, "b": VALUE_HEADS, "a": VALUE_HEADS}
    return {
        **{f"{net}.in_proj_{name}.weight": (rows, HIDDEN) for name, rows in products.items()},
        f"{net}.conv1d.weight": (CHANNELS, 1, TAPS),
        f"{net}.A_log": (VALUE_HEADS,),
        f"{net}.dt_bias": (VALUE_HEADS,),
        f"{net}.norm.weight": (WIDTH,),
        f"{net}.out_proj.weight": (HIDDEN, VALUES),
    }


def _attention(layer: str) -> Shapes:
    attention, query, key = f"{layer}.self_attn", HEADS * HEAD, KV_HEADS * HEAD
    rows = {"q": 2 * query, "k": key, "v": key}
    shapes: Shapes = {f"{attention}.{part}_proj.weight": (count, HIDDEN) for part, count in rows.items()}
    shapes |= {f"{attention}.{part}_norm.weight": (HEAD,) for part in "qk"}
    return shapes | {f"{attention}.o_proj.weight": (HIDDEN, query)}


def _experts(mlp: str, form: str) -> Shapes:
    shapes: Shapes = {f"{mlp}.gate.weight": (COUNT, HIDDEN), f"{mlp}.shared_expert_gate.weight": (1, HIDDEN)}
    shapes |= gated_shapes(f"{mlp}.shared_expert", SHARED)
    if form == "moe":
        shapes[f"{mlp}.experts.gate_up_proj"] = (COUNT, 2 * EXPERT, HIDDEN)
        shapes[f"{mlp}.experts.down_proj"] = (COUNT, HIDDEN, EXPERT)
        return shapes
    for expert in range(COUNT):
        shapes |= gated_shapes(f"{mlp}.experts.{expert}", EXPERT)
    return shapes
