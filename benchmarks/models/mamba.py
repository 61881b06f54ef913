"""Writes a model of random weights in the shape of Granite 4.0 H, with Mamba 2, for speed measurements.

    python benchmarks/models/mamba.py 350m Q8_0 /tmp/mamba.gguf
    python benchmarks/compare.py /tmp/mamba.gguf --llama-bench PATH

Matrices and the embedding have the one type; vectors, convolutions and the numbers of heads are float32.
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

_PERIOD, _ATTENTION, _HEADS, _KV_HEADS = 10, 5, 12, 4
_TAPS, _STATE, _MAMBA_HEADS = 4, 128, 48
_VOCABULARY = 32000


@dataclass(frozen=True, slots=True)
class MambaShape:
    """Widths in channels; one of ten layers has attention."""

    hidden: int
    layers: int
    ffn: int

    @property
    def inner(self) -> int:
        return 2 * self.hidden

    @property
    def head(self) -> int:
        return self.hidden // _HEADS

    def attends(self, layer: int) -> bool:
        return layer % _PERIOD == _ATTENTION


SHAPES = {"350m": MambaShape(768, 32, 2048), "1b": MambaShape(1536, 40, 4096)}


@dataclass(frozen=True, slots=True)
class Writer:
    """Tensors of a shape, made when they are written."""

    shape: MambaShape
    quant_type: QuantType
    generator: np.random.Generator

    def tensors(self) -> Iterator[TensorSource]:
        shape = self.shape
        yield self._matrix("token_embd", _VOCABULARY, shape.hidden)
        for number in range(shape.layers):
            layer = f"blk.{number}"
            yield self._floats(f"{layer}.attn_norm.weight", 0.0, shape.hidden, mean=1.0)
            yield from self._attention(layer) if shape.attends(number) else self._mamba(layer)
            yield self._floats(f"{layer}.ffn_norm.weight", 0.0, shape.hidden, mean=1.0)
            yield self._matrix(f"{layer}.ffn_gate", shape.ffn, shape.hidden)
            yield self._matrix(f"{layer}.ffn_up", shape.ffn, shape.hidden)
            yield self._matrix(f"{layer}.ffn_down", shape.hidden, shape.ffn)
        yield self._floats("output_norm.weight", 0.0, shape.hidden, mean=1.0)

    def _attention(self, layer: str) -> Iterator[TensorSource]:
        shape = self.shape
        for name, heads in (("attn_q", _HEADS), ("attn_k", _KV_HEADS), ("attn_v", _KV_HEADS)):
            yield self._matrix(f"{layer}.{name}", heads * shape.head, shape.hidden)
        yield self._matrix(f"{layer}.attn_output", shape.hidden, shape.hidden)

    def _mamba(self, layer: str) -> Iterator[TensorSource]:
        shape, convolved = self.shape, self.shape.inner + 2 * _STATE
        yield self._matrix(f"{layer}.ssm_in", shape.inner + convolved + _MAMBA_HEADS, shape.hidden)
        yield self._floats(f"{layer}.ssm_conv1d.weight", 0.5, convolved, _TAPS)
        yield self._floats(f"{layer}.ssm_conv1d.bias", 0.1, convolved)
        yield self._floats(f"{layer}.ssm_dt.bias", 0.5, _MAMBA_HEADS, mean=-2.0)
        yield self._floats(f"{layer}.ssm_a", 0.1, _MAMBA_HEADS, 1, mean=-1.0)
        yield self._floats(f"{layer}.ssm_d", 0.1, _MAMBA_HEADS, 1, mean=1.0)
        yield self._floats(f"{layer}.ssm_norm.weight", 0.0, 1, shape.inner, mean=1.0)
        yield self._matrix(f"{layer}.ssm_out", shape.hidden, shape.inner)

    def _matrix(self, name: str, *size: int) -> TensorSource:
        make = lambda: random_matrix(self.generator, self.quant_type, size)  # noqa: E731
        return TensorSource(f"{name}.weight", self.quant_type, size, make)

    def _floats(self, name: str, deviation: float, *size: int, mean: float = 0.0) -> TensorSource:
        values = (mean + deviation * self.generator.standard_normal(size)).astype(np.float32)
        return TensorSource(name, QuantType.F32, size, lambda: values.data)


def metadata(name: str, shape: MambaShape, quant_type: QuantType) -> dict[str, WritableValue]:
    """What both our engine and llama.cpp want to know."""
    kv_heads = [_KV_HEADS if shape.attends(layer) else 0 for layer in range(shape.layers)]
    own: dict[str, WritableValue] = {
        "context_length": 8192,
        "embedding_length": shape.hidden,
        "block_count": shape.layers,
        "feed_forward_length": shape.ffn,
        "attention.head_count": _HEADS,
        "attention.head_count_kv": np.array(kv_heads, np.int32),
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.scaling.finetuned": False,
        "logit_scale": 4.0,
        "ssm.conv_kernel": _TAPS,
        "ssm.state_size": _STATE,
        "ssm.group_count": 1,
        "ssm.time_step_rank": _MAMBA_HEADS,
        "ssm.inner_size": shape.inner,
        "vocab_size": _VOCABULARY,
    }
    return {
        "general.architecture": "granitehybrid",
        "general.name": f"random {name} {quant_type.name}",
        "general.file_type": LAYOUTS[quant_type].file_type,
        "general.quantization_version": 2,
        **{f"granitehybrid.{key}": value for key, value in own.items()},
        **tokenizer(_VOCABULARY),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model of random weights with Mamba 2.")
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
