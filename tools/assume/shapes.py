"""Shapes of public models: sizes and metadata keys as in their GGUF files. Data only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from llamaclust.tools.assume.layer_tensors import HEAD, LAST_LAYERS, LAYERS, LEADING_LAYERS, NEXTN, OUTSIDE, Tensors

Scalar = int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A public model's shape. `ffn` is the width of dense feed-forward layers. `mix` is the default quantization."""

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
    leading_layers: int = 0  # Number of first layers, which have no experts.
    period: int = 0  # If not 0, the last layer of every `period` layers has different tensors.
    delta_heads: int = 0  # Number of heads in layers with a gated delta net.
    delta_key_heads: int = 0
    delta_dim: int = 0
    delta_taps: int = 4
    is_tied: bool = False  # True if the embedding is also the output matrix.
    has_nextn: bool = False  # True if the file has an additional MTP layer, which is not loaded.
    mix: str = "Q4_K_M"
    keys: Mapping[str, Scalar | str] = field(default_factory=dict)  # No key has the architecture's prefix.
    arrays: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def size(self, name: str) -> int:
        queries, delta_values = self.heads * self.head_dim, self.delta_heads * self.delta_dim
        derived = {
            "queries": queries,
            "queries+gates": 2 * queries,
            "keys": self.kv_heads * self.head_dim,
            "queries+keys+values": queries + 2 * self.kv_heads * self.head_dim,
            "gate+up": 2 * self.ffn,
            "hidden+embedding": 2 * self.hidden,
            "delta_values": delta_values,
            "delta_mixed": delta_values + 2 * self.delta_key_heads * self.delta_dim,
        }
        return derived[name] if name in derived else int(getattr(self, name))

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, sizes in {**OUTSIDE, **({} if self.is_tied else HEAD)}.items():
            yield name, tuple(map(self.size, sizes))
        for layer in range(self.layers + self.has_nextn):
            for name, sizes in {**self._layer(layer), **(NEXTN if layer == self.layers else {})}.items():
                yield f"blk.{layer}.{name}", tuple(map(self.size, sizes))

    def _layer(self, layer: int) -> Tensors:
        is_last = self.period and (layer + 1) % self.period == 0
        tables = LEADING_LAYERS if layer < self.leading_layers else LAST_LAYERS if is_last else LAYERS
        return tables[self.architecture]

    @property
    def parameters(self) -> int:
        return sum(prod(sizes) for _, sizes in self.tensors())


_GPT_OSS_SHAPE = ModelShape(
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

SHAPES: Mapping[str, ModelShape] = {
    "7b": ModelShape(
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
    "8b": ModelShape(
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
    "70b": ModelShape(
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
    "qwen3-30b-a3b": ModelShape(
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
    "glm-4.5-air": ModelShape(
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
        has_nextn=True,
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
    "qwen3.5-35b-a3b": ModelShape(
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
