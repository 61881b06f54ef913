"""Lists the tensors in a layer of each architecture, by their GGUF names. Dimensions are given by name, as in
("queries", "hidden"). `ModelShape.size` returns the number for a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

Sizes = tuple[str, ...]
"""Names of a tensor's dimensions. The last name is for the dimension whose elements are contiguous."""
Tensors = Mapping[str, Sizes]

_NORMS = {"attn_norm.weight": ("hidden",), "ffn_norm.weight": ("hidden",)}
_POST_NORMS = {"attn_norm.weight": ("hidden",), "post_attention_norm.weight": ("hidden",)}
_HEAD_NORMS = {"attn_q_norm.weight": ("head_dim",), "attn_k_norm.weight": ("head_dim",)}
_ATTENTION = {
    "attn_q.weight": ("queries", "hidden"),
    "attn_k.weight": ("keys", "hidden"),
    "attn_v.weight": ("keys", "hidden"),
    "attn_output.weight": ("hidden", "queries"),
}
_QKV_BIASES = {"attn_q.bias": ("queries",), "attn_k.bias": ("keys",), "attn_v.bias": ("keys",)}
_FEED_FORWARD = {
    "ffn_gate.weight": ("ffn", "hidden"),
    "ffn_up.weight": ("ffn", "hidden"),
    "ffn_down.weight": ("hidden", "ffn"),
}
_EXPERTS = {
    "ffn_gate_inp.weight": ("experts", "hidden"),
    "ffn_gate_exps.weight": ("experts", "expert_ffn", "hidden"),
    "ffn_up_exps.weight": ("experts", "expert_ffn", "hidden"),
    "ffn_down_exps.weight": ("experts", "hidden", "expert_ffn"),
}
_SHARED_EXPERT = {
    "ffn_gate_shexp.weight": ("shared_ffn", "hidden"),
    "ffn_up_shexp.weight": ("shared_ffn", "hidden"),
    "ffn_down_shexp.weight": ("hidden", "shared_ffn"),
}
_GPT_OSS = {
    "attn_output.bias": ("hidden",),
    "attn_sinks.weight": ("heads",),
    "ffn_gate_inp.bias": ("experts",),
    "ffn_gate_exps.bias": ("experts", "expert_ffn"),
    "ffn_up_exps.bias": ("experts", "expert_ffn"),
    "ffn_down_exps.bias": ("experts", "hidden"),
}

_GATED_ATTENTION = {**_ATTENTION, **_HEAD_NORMS, "attn_q.weight": ("queries+gates", "hidden")}
_DELTA_NET = {
    "attn_qkv.weight": ("delta_mixed", "hidden"),
    "attn_gate.weight": ("delta_values", "hidden"),
    "ssm_alpha.weight": ("delta_heads", "hidden"),
    "ssm_beta.weight": ("delta_heads", "hidden"),
    "ssm_conv1d.weight": ("delta_mixed", "delta_taps"),
    "ssm_dt.bias": ("delta_heads",),
    "ssm_a": ("delta_heads",),
    "ssm_norm.weight": ("delta_dim",),
    "ssm_out.weight": ("hidden", "delta_values"),
}
_GATED_EXPERT = {**_SHARED_EXPERT, "ffn_gate_inp_shexp.weight": ("hidden",)}

_FUSED_FEED_FORWARD = {"ffn_up.weight": ("gate+up", "hidden"), "ffn_down.weight": ("hidden", "ffn")}
_LLAMA = {**_NORMS, **_ATTENTION, **_FEED_FORWARD}
_NORMS_AFTER = {"post_attention_norm.weight": ("hidden",), "post_ffw_norm.weight": ("hidden",)}
_WHOLE_NORMS = {"attn_q_norm.weight": ("queries",), "attn_k_norm.weight": ("keys",)}
_FUSED_ATTENTION = {"attn_qkv.weight": ("queries+keys+values", "hidden"), "attn_output.weight": ("hidden", "queries")}

LAYERS: Final[Mapping[str, Tensors]] = {
    "llama": _LLAMA,
    "mistral3": _LLAMA,
    "smollm3": _LLAMA,
    "ernie4_5": _LLAMA,
    "granite": _LLAMA,
    "seed_oss": {**_POST_NORMS, **_ATTENTION, **_QKV_BIASES, **_FEED_FORWARD},
    "qwen2": {**_LLAMA, **_QKV_BIASES},
    "qwen3": {**_LLAMA, **_HEAD_NORMS},
    "gemma2": {**_LLAMA, **_NORMS_AFTER},
    "gemma3": {**_LLAMA, **_NORMS_AFTER, **_HEAD_NORMS},
    "phi3": {**_NORMS, **_FUSED_ATTENTION, **_FUSED_FEED_FORWARD},
    "glm4": {**_NORMS, **_NORMS_AFTER, **_ATTENTION, **_QKV_BIASES, **_FUSED_FEED_FORWARD},
    "olmo2": {**_NORMS_AFTER, **_ATTENTION, **_WHOLE_NORMS, **_FEED_FORWARD},
    "exaone4": {**_NORMS_AFTER, **_ATTENTION, **_HEAD_NORMS, **_FEED_FORWARD},
    "cohere2": {"attn_norm.weight": ("hidden",), **_ATTENTION, **_FEED_FORWARD},
    "qwen3moe": {**_NORMS, **_ATTENTION, **_HEAD_NORMS, **_EXPERTS},
    "ernie4_5-moe": {**_NORMS, **_ATTENTION, **_EXPERTS, **_SHARED_EXPERT, "exp_probs_b.bias": ("experts",)},
    "bailingmoe2": {
        **_NORMS,
        **_FUSED_ATTENTION,
        **_HEAD_NORMS,
        **_EXPERTS,
        **_SHARED_EXPERT,
        "exp_probs_b.bias": ("experts",),
    },
    "gpt-oss": {**_POST_NORMS, **_ATTENTION, **_QKV_BIASES, **_EXPERTS, **_GPT_OSS},
    "glm4moe": {
        **_POST_NORMS,
        **_ATTENTION,
        **_QKV_BIASES,
        **_EXPERTS,
        **_SHARED_EXPERT,
        "exp_probs_b.bias": ("experts",),
    },
    "qwen35moe": {**_POST_NORMS, **_DELTA_NET, **_EXPERTS, **_GATED_EXPERT},
}

LEADING_LAYERS: Final[Mapping[str, Tensors]] = {
    "glm4moe": {**_POST_NORMS, **_ATTENTION, **_QKV_BIASES, **_FEED_FORWARD},
    "ernie4_5-moe": _LLAMA,
    "bailingmoe2": {**_NORMS, **_FUSED_ATTENTION, **_HEAD_NORMS, **_FEED_FORWARD},
}

LAST_LAYERS: Final[Mapping[str, Tensors]] = {
    "qwen35moe": {**_POST_NORMS, **_GATED_ATTENTION, **_EXPERTS, **_GATED_EXPERT}
}
"""Tensors of every n-th layer, where n is `ModelShape.period`."""

OUTSIDE: Final[Tensors] = {"token_embd.weight": ("vocabulary", "hidden"), "output_norm.weight": ("hidden",)}
HEAD: Final[Tensors] = {"output.weight": ("vocabulary", "hidden")}

NEXTN: Final[Tensors] = {
    "nextn.eh_proj.weight": ("hidden", "hidden+embedding"),
    "nextn.embed_tokens.weight": ("vocabulary", "hidden"),
    "nextn.enorm.weight": ("hidden",),
    "nextn.hnorm.weight": ("hidden",),
    "nextn.shared_head_head.weight": ("vocabulary", "hidden"),
    "nextn.shared_head_norm.weight": ("hidden",),
}
