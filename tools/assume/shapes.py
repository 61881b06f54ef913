"""Shapes of public models by name: widths, keys and tensors, as their files have them. Data only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

Scalar = int | float | bool

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

Sizes = tuple[str, ...]
"""Of a tensor, slowest first, by the names of `Shape.sizes`."""

_LAYERS: Mapping[str, Mapping[str, Sizes]] = {
    "llama": {**_NORMS, **_ATTENTION, **_FEED_FORWARD},
    "qwen3moe": {**_NORMS, **_ATTENTION, **_HEAD_NORMS, **_EXPERTS},
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
"""Tensors of a layer, by architecture."""

_LEADING_LAYERS: Mapping[str, Mapping[str, Sizes]] = {
    "glm4moe": {**_POST_NORMS, **_ATTENTION, **_QKV_BIASES, **_FEED_FORWARD}
}
"""Of layers without experts before the others."""

_LAST_LAYERS: Mapping[str, Mapping[str, Sizes]] = {
    "qwen35moe": {**_POST_NORMS, **_GATED_ATTENTION, **_EXPERTS, **_GATED_EXPERT}
}
"""Of the last layer of each period."""

_MODEL: Mapping[str, Sizes] = {
    "token_embd.weight": ("vocabulary", "hidden"),
    "output_norm.weight": ("hidden",),
    "output.weight": ("vocabulary", "hidden"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A public model: `ffn` of layers without experts. `mix`: how its files are usually quantized."""

    architecture: str
    title: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    ffn: int
    rope_base: float
    head_dim: int = 128
    experts: int = 0
    used: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    leading_layers: int = 0  # without experts
    period: int = 0  # of layers, whose last one differs
    delta_heads: int = 0  # of a gated delta net
    delta_key_heads: int = 0
    delta_dim: int = 0
    delta_taps: int = 4
    mix: str = "Q4_K_M"
    keys: Mapping[str, Scalar | str] = field(default_factory=dict)  # further ones, without the architecture's name
    arrays: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def size(self, name: str) -> int:
        """By the names that tables of tensors use."""
        queries, delta_values = self.heads * self.head_dim, self.delta_heads * self.delta_dim
        derived = {
            "queries": queries,
            "queries+gates": 2 * queries,
            "keys": self.kv_heads * self.head_dim,
            "delta_values": delta_values,
            "delta_mixed": delta_values + 2 * self.delta_key_heads * self.delta_dim,
        }
        return derived[name] if name in derived else int(getattr(self, name))

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor."""
        for name, sizes in _MODEL.items():
            yield name, tuple(map(self.size, sizes))
        for layer in range(self.layers):
            for name, sizes in self._layer(layer).items():
                yield f"blk.{layer}.{name}", tuple(map(self.size, sizes))

    def _layer(self, layer: int) -> Mapping[str, Sizes]:
        is_last = self.period and (layer + 1) % self.period == 0
        tables = _LEADING_LAYERS if layer < self.leading_layers else _LAST_LAYERS if is_last else _LAYERS
        return tables[self.architecture]

    @property
    def parameters(self) -> int:
        return sum(prod(sizes) for _, sizes in self.tensors())


_GPT_OSS_SHAPE = Shape(
    architecture="gpt-oss",
    title="gpt-oss 20b",
    hidden=2880,
    layers=24,
    heads=64,
    kv_heads=8,
    head_dim=64,
    vocabulary=201088,
    context=131072,
    ffn=2880,
    experts=32,
    used=4,
    expert_ffn=2880,
    rope_base=150000.0,
    mix="MXFP4_MOE",
    keys={
        "attention.sliding_window": 128,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 4096,
    },
)

SHAPES: Mapping[str, Shape] = {
    "7b": Shape(
        architecture="llama",
        title="LLaMA 2 7B",
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        vocabulary=32000,
        context=4096,
        ffn=11008,
        rope_base=10000.0,
    ),
    "8b": Shape(
        architecture="llama",
        title="LLaMA 3.1 8B",
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        vocabulary=128256,
        context=131072,
        ffn=14336,
        rope_base=500000.0,
    ),
    "70b": Shape(
        architecture="llama",
        title="LLaMA 3.1 70B",
        hidden=8192,
        layers=80,
        heads=64,
        kv_heads=8,
        vocabulary=128256,
        context=131072,
        ffn=28672,
        rope_base=500000.0,
    ),
    "gpt-oss-20b": _GPT_OSS_SHAPE,
    "gpt-oss-120b": replace(_GPT_OSS_SHAPE, title="gpt-oss 120b", layers=36, experts=128),
    "qwen3-30b-a3b": Shape(
        architecture="qwen3moe",
        title="Qwen3 30B-A3B",
        hidden=2048,
        layers=48,
        heads=32,
        kv_heads=4,
        vocabulary=151936,
        context=40960,
        ffn=6144,
        experts=128,
        used=8,
        expert_ffn=768,
        rope_base=1000000.0,
    ),
    "glm-4.5-air": Shape(
        architecture="glm4moe",
        title="GLM 4.5 Air",
        hidden=4096,
        layers=46,
        heads=96,
        kv_heads=8,
        vocabulary=151552,
        context=131072,
        ffn=10944,
        experts=128,
        used=8,
        expert_ffn=1408,
        shared_ffn=1408,
        leading_layers=1,
        rope_base=1000000.0,
        keys={
            "rope.dimension_count": 64,
            "expert_shared_count": 1,
            "leading_dense_block_count": 1,
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.0,
        },
    ),
    "qwen3.5-35b-a3b": Shape(
        architecture="qwen35moe",
        title="Qwen3.5 35B-A3B",
        hidden=2048,
        layers=40,
        heads=16,
        kv_heads=2,
        head_dim=256,
        vocabulary=248320,
        context=262144,
        ffn=512,
        experts=256,
        used=8,
        expert_ffn=512,
        shared_ffn=512,
        rope_base=10000000.0,
        period=4,
        delta_heads=32,
        delta_key_heads=16,
        delta_dim=128,
        keys={
            "rope.dimension_count": 64,
            "expert_shared_feed_forward_length": 512,
            "full_attention_interval": 4,
            "ssm.time_step_rank": 32,
            "ssm.group_count": 16,
            "ssm.state_size": 128,
            "ssm.inner_size": 4096,
            "ssm.conv_kernel": 4,
        },
        arrays={"rope.dimension_sections": (11, 11, 10, 0)},
    ),
}
