"""Writes a model of random weights in the shape of Qwen 3.5, with gated delta nets, for speed measurements.

    python benchmarks/models/delta_net.py 2b Q4_K /tmp/delta.gguf
    python benchmarks/compare.py /tmp/delta.gguf --llama-bench PATH

Matrices and the embedding have the one type; vectors, convolutions and the gates of heads are float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from shape import LAYOUTS, random_matrix, tokenizer

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType

_PERIOD, _TAPS, _HEAD, _DELTA_HEAD = 4, 4, 256, 128
_VOCABULARY = 32000


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """Widths in channels; three of four layers have `delta_heads` heads of values and `delta_keys` of keys."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    delta_heads: int
    delta_keys: int

    @property
    def mixed(self) -> int:
        """Channels of keys, queries and values of a delta net."""
        return (2 * self.delta_keys + self.delta_heads) * _DELTA_HEAD


SHAPES = {
    "0.8b": DeltaShape(1024, 24, 3584, 8, 2, 16, 16),
    "2b": DeltaShape(2048, 24, 6144, 8, 2, 16, 16),
    "4b": DeltaShape(2560, 32, 9216, 16, 4, 32, 16),
}


@dataclass(frozen=True, slots=True)
class Writer:
    """Tensors of a shape, made when they are written."""

    shape: DeltaShape
    quant_type: QuantType
    generator: np.random.Generator

    def tensors(self) -> Iterator[TensorSource]:
        shape = self.shape
        yield self._matrix("token_embd", _VOCABULARY, shape.hidden)
        for number in range(shape.layers):
            layer = f"blk.{number}"
            yield self._ones(f"{layer}.attn_norm.weight", shape.hidden)
            yield from self._attention(layer) if (number + 1) % _PERIOD == 0 else self._delta_net(layer)
            yield self._ones(f"{layer}.post_attention_norm.weight", shape.hidden)
            yield self._matrix(f"{layer}.ffn_gate", shape.ffn, shape.hidden)
            yield self._matrix(f"{layer}.ffn_up", shape.ffn, shape.hidden)
            yield self._matrix(f"{layer}.ffn_down", shape.hidden, shape.ffn)
        yield self._ones("output_norm.weight", shape.hidden)

    def _attention(self, layer: str) -> Iterator[TensorSource]:
        shape = self.shape
        yield self._matrix(f"{layer}.attn_q", 2 * shape.heads * _HEAD, shape.hidden)
        for name in ("attn_k", "attn_v"):
            yield self._matrix(f"{layer}.{name}", shape.kv_heads * _HEAD, shape.hidden)
        for name in ("attn_q_norm", "attn_k_norm"):
            yield self._ones(f"{layer}.{name}.weight", _HEAD)
        yield self._matrix(f"{layer}.attn_output", shape.hidden, shape.heads * _HEAD)

    def _delta_net(self, layer: str) -> Iterator[TensorSource]:
        shape, width = self.shape, self.shape.delta_heads * _DELTA_HEAD
        yield self._matrix(f"{layer}.attn_qkv", shape.mixed, shape.hidden)
        yield self._matrix(f"{layer}.attn_gate", width, shape.hidden)
        for name in ("ssm_alpha", "ssm_beta"):
            yield self._floats(f"{layer}.{name}.weight", 0.02, shape.delta_heads, shape.hidden)
        yield self._floats(f"{layer}.ssm_conv1d.weight", 0.5, shape.mixed, _TAPS)
        yield self._floats(f"{layer}.ssm_dt.bias", 0.5, shape.delta_heads)
        yield self._floats(f"{layer}.ssm_a", 0.01, shape.delta_heads, mean=-0.1)
        yield self._ones(f"{layer}.ssm_norm.weight", _DELTA_HEAD)
        yield self._matrix(f"{layer}.ssm_out", shape.hidden, width)

    def _matrix(self, name: str, *size: int) -> TensorSource:
        make = lambda: random_matrix(self.generator, self.quant_type, size)  # noqa: E731
        return TensorSource(f"{name}.weight", self.quant_type, size, make)

    def _floats(self, name: str, deviation: float, *size: int, mean: float = 0.0) -> TensorSource:
        values = (mean + deviation * self.generator.standard_normal(size)).astype(np.float32)
        return TensorSource(name, QuantType.F32, size, lambda: values.data)

    def _ones(self, name: str, width: int) -> TensorSource:
        return TensorSource(name, QuantType.F32, (width,), lambda: np.ones(width, np.float32).data)


def metadata(name: str, shape: DeltaShape, quant_type: QuantType) -> dict[str, WritableValue]:
    """What both our engine and llama.cpp want to know."""
    own: dict[str, WritableValue] = {
        "context_length": 8192,
        "embedding_length": shape.hidden,
        "block_count": shape.layers,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": _HEAD,
        "attention.value_length": _HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e7,
        "rope.dimension_count": _HEAD // 4,
        "rope.dimension_sections": np.array([11, 11, 10, 0], np.int32),
        "full_attention_interval": _PERIOD,
        "ssm.conv_kernel": _TAPS,
        "ssm.state_size": _DELTA_HEAD,
        "ssm.group_count": shape.delta_keys,
        "ssm.time_step_rank": shape.delta_heads,
        "ssm.inner_size": shape.delta_heads * _DELTA_HEAD,
        "vocab_size": _VOCABULARY,
    }
    return {
        "general.architecture": "qwen35",
        "general.name": f"random {name} {quant_type.name}",
        "general.file_type": LAYOUTS[quant_type].file_type,
        "general.quantization_version": 2,
        **{f"qwen35.{key}": value for key, value in own.items()},
        **tokenizer(_VOCABULARY),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model of random weights with gated delta nets.")
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("type", choices=[quant_type.name for quant_type in LAYOUTS])
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    shape, quant_type = SHAPES[arguments.name], QuantType[arguments.type]
    writer = Writer(shape, quant_type, np.random.default_rng(arguments.seed))
    write_gguf(arguments.path, metadata(arguments.name, shape, quant_type), list(writer.tensors()))


if __name__ == "__main__":
    with ends_in_one_line():
        main()
