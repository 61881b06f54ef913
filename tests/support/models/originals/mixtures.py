"""Hunyuan, dense and with experts, and MiniMax M2."""

from __future__ import annotations

from support.models.originals.original import Original, keys, rope

MIXTURE_ORIGINALS = {
    "hunyuan-dense": Original(
        "HunYuanDenseV1ForCausalLM", keys(head_dim=32, **rope("dynamic", alpha=50.0, factor=1.0))
    ),
    "hunyuan-moe": Original(
        "HunYuanMoEV1ForCausalLM",
        keys(head_dim=16, num_experts=6, moe_topk=3, **rope("dynamic", alpha=1000.0, factor=1.0)),
    ),
    "minimax-m2": Original(
        "MiniMaxM2ForCausalLM",
        keys(
            head_dim=32,
            num_local_experts=6,
            num_experts_per_tok=3,
            **rope("default", partial_rotary_factor=0.5),
        ),
    ),
}
