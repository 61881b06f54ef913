"""Writes a LLaMA-shaped model of random weights, for speed measurements. A kernel's speed does not depend on values.

    python benchmarks/shape.py 1.1b Q4_K /tmp/shape.gguf
    python benchmarks/shape.py 70b Q4_K /tmp/70b.gguf --alike     # 39 GB as quickly as the disk takes them

All matrices and the embedding have the given type. Norms and routers are float32. The file also loads in llama.cpp."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import log2, prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.errors import UsageError
from llamaclust.model.gguf.writer import TensorSource, WritableValue, write_gguf
from llamaclust.model.quant_types import QuantType


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a model. Widths are in channels. `experts`, if not 0, replace each feed-forward network."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    context: int = 8192
    experts: int = 0
    experts_used: int = 2
    tied: int = 0  # 1 if the head is the embedding.

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "1.1b": Shape(2048, 22, 5632, 32, 4),
    "7b": Shape(4096, 32, 11008, 32, 32),
    "13b": Shape(5120, 40, 13824, 40, 40),
    "70b": Shape(8192, 80, 28672, 64, 8),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Describes random blocks with plausible weights. `scales` has (byte offset, size relative to the first scale) of
    each float16 scale in a block. `deviation` is the standard deviation of the weights if the first scale is 1."""

    file_type: int
    scales: tuple[tuple[int, float], ...]
    deviation: float


LAYOUTS = {
    QuantType.F32: Layout(0, (), 1.0),
    QuantType.F16: Layout(1, (), 1.0),
    QuantType.BF16: Layout(32, (), 1.0),
    QuantType.Q4_0: Layout(2, ((0, 1.0),), 4.6),
    QuantType.Q4_1: Layout(3, ((0, 1.0), (2, -7.5)), 4.6),
    QuantType.Q5_0: Layout(8, ((0, 1.0),), 9.2),
    QuantType.Q5_1: Layout(9, ((0, 1.0), (2, -15.5)), 9.2),
    QuantType.Q8_0: Layout(7, ((0, 1.0),), 74.0),
    QuantType.Q2_K: Layout(10, ((80, 1.0), (82, 1.5)), 13.9),
    QuantType.Q3_K: Layout(12, ((108, 1.0),), 43.3),
    QuantType.Q4_K: Layout(15, ((0, 1.0), (2, 7.5)), 258.0),
    QuantType.Q5_K: Layout(17, ((0, 1.0), (2, 15.5)), 527.0),
    QuantType.Q6_K: Layout(18, ((208, 1.0),), 1369.0),
    QuantType.IQ4_NL: Layout(25, ((0, 1.0),), 67.0),
    QuantType.IQ4_XS: Layout(30, ((0, 1.0),), 1247.0),
    QuantType.MXFP4: Layout(38, (), 5.9),
    QuantType.TQ2_0: Layout(37, ((64, 1.0),), 0.71),
    QuantType.TQ1_0: Layout(36, ((52, 1.0),), 0.82),
    QuantType.IQ2_XXS: Layout(19, ((0, 1.0),), 53.0),
    QuantType.IQ2_XS: Layout(20, ((0, 1.0),), 56.0),
    QuantType.IQ2_S: Layout(28, ((0, 1.0),), 56.0),
    QuantType.IQ3_XXS: Layout(23, ((0, 1.0),), 142.0),
    QuantType.IQ3_S: Layout(26, ((0, 1.0),), 140.0),
    QuantType.IQ1_S: Layout(24, ((0, 1.0),), 7.2),
    QuantType.IQ1_M: Layout(31, (), 7.2),
}

_FLOATS: dict[QuantType, tuple[np.dtype[np.uint16 | np.uint32], int]] = {
    QuantType.F32: (np.dtype(np.uint32), 0x807FFFFF),
    QuantType.F16: (np.dtype(np.uint16), 0x83FF),
    QuantType.BF16: (np.dtype(np.uint16), 0x807F),
}
"""The unsigned integer that holds each float type, and the mask of its sign and mantissa."""


def random_matrix(
    generator: np.random.Generator, quant_type: QuantType, shape: tuple[int, ...], strength: float = 1.0
) -> memoryview:
    """Returns the bytes of a matrix whose weights have a standard deviation near `strength` / sqrt(width)."""
    layout, info = LAYOUTS[quant_type], quant_type.info
    deviation = strength * shape[-1] ** -0.5
    words = -(-prod(shape) // info.block_size * info.block_bytes // 8)
    data = generator.integers(0, 1 << 64, words, np.uint64).view(np.uint8)
    data = data[: prod(shape) // info.block_size * info.block_bytes]
    if quant_type in _FLOATS:
        _make_signed_near(data, quant_type, deviation)
        return data.data
    blocks = data.reshape(-1, info.block_bytes)
    for offset, relative in layout.scales:
        scale = np.array([relative * deviation / layout.deviation], np.float16)
        blocks[:, offset : offset + 2] = scale.view(np.uint8)
    if quant_type is QuantType.TQ2_0:
        # The value 3, which quantizers never write, becomes 1.
        blocks[:, :64] ^= blocks[:, :64] & blocks[:, :64] << 1 & 0xAA
    if quant_type is QuantType.MXFP4:
        blocks[:, 0] = 128 + round(log2(deviation / layout.deviation))
    if quant_type is QuantType.IQ1_M:
        _set_quarters(blocks, np.float16(deviation / layout.deviation))
    return data.data


def _set_quarters(blocks: NDArray[np.uint8], scale: np.float16) -> None:
    """Sets the float16 scale of IQ1_M blocks, whose bits are spread over the last four 16-bit words of a block."""
    for quarter in range(4):
        place = blocks[:, 49 + 2 * quarter]
        place[:] = place & 15 | (int(scale.view(np.uint16)) >> 4 * quarter & 15) << 4


def _make_signed_near(data: NDArray[np.uint8], quant_type: QuantType, size: float) -> None:
    """Turns random bits into floats of random sign. Their magnitude is 1 to 2 times a power of two near `size`."""
    word, kept = _FLOATS[quant_type]
    bits, least = data.view(word), np.array([size / 1.08], np.float32)
    if quant_type is QuantType.F16:
        sample = least.astype(np.float16).view(np.uint16).astype(word)
    else:
        sample = (least.view(np.uint32) >> np.uint32(0 if quant_type is QuantType.F32 else 16)).astype(word)
    exponent = sample[0] & ~word.type(kept)
    np.bitwise_and(bits, word.type(kept), out=bits)
    np.bitwise_or(bits, exponent, out=bits)


def tensors(shape: Shape, quant_type: QuantType, seed: int, alike: bool = False) -> Iterator[TensorSource]:
    """Yields the model's tensors in file order. Bytes are made when they are written. If `alike`, layers share
    bytes."""
    generator, made = np.random.default_rng(seed), dict[str, memoryview]()

    def random(name: str, size: tuple[int, ...]) -> memoryview:
        if not (alike and name.startswith("blk.")):
            return random_matrix(generator, quant_type, size)
        place = name.split(".")[2]
        if place not in made:
            made[place] = random_matrix(generator, quant_type, size)
        return made[place]

    def matrix(name: str, *size: int) -> TensorSource:
        return TensorSource(f"{name}.weight", quant_type, size, lambda: random(name, size))

    def norm(name: str) -> TensorSource:
        ones = np.ones(shape.hidden, np.float32)
        return TensorSource(f"{name}.weight", QuantType.F32, ones.shape, lambda: ones.data)

    def feed_forward(layer: str) -> Iterator[TensorSource]:
        experts, suffix = ((shape.experts,), "_exps") if shape.experts else ((), "")
        if shape.experts:
            router = generator.standard_normal((shape.experts, shape.hidden), np.float32) / shape.hidden**0.5
            yield TensorSource(f"{layer}.ffn_gate_inp.weight", QuantType.F32, router.shape, lambda: router.data)
        yield matrix(f"{layer}.ffn_gate{suffix}", *experts, shape.ffn, shape.hidden)
        yield matrix(f"{layer}.ffn_up{suffix}", *experts, shape.ffn, shape.hidden)
        yield matrix(f"{layer}.ffn_down{suffix}", *experts, shape.hidden, shape.ffn)

    kv_width = shape.kv_heads * shape.head_dim
    yield matrix("token_embd", shape.vocabulary, shape.hidden)
    for layer in (f"blk.{number}" for number in range(shape.layers)):
        yield norm(f"{layer}.attn_norm")
        yield matrix(f"{layer}.attn_q", shape.hidden, shape.hidden)
        yield matrix(f"{layer}.attn_k", kv_width, shape.hidden)
        yield matrix(f"{layer}.attn_v", kv_width, shape.hidden)
        yield matrix(f"{layer}.attn_output", shape.hidden, shape.hidden)
        yield norm(f"{layer}.ffn_norm")
        yield from feed_forward(layer)
    yield norm("output_norm")
    if not shape.tied:
        yield matrix("output", shape.vocabulary, shape.hidden)


def metadata(name: str, shape: Shape, quant_type: QuantType) -> dict[str, WritableValue]:
    experts: dict[str, WritableValue] = {
        "llama.expert_count": shape.experts,
        "llama.expert_used_count": shape.experts_used,
    }
    return {
        **(experts if shape.experts else {}),
        "general.architecture": "llama",
        "general.name": f"random {name} {quant_type.name}",
        "general.file_type": LAYOUTS[quant_type].file_type,
        "general.quantization_version": 2,
        "llama.context_length": shape.context,
        "llama.embedding_length": shape.hidden,
        "llama.block_count": shape.layers,
        "llama.feed_forward_length": shape.ffn,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.vocab_size": shape.vocabulary,
        **tokenizer(shape.vocabulary),
    }


def tokenizer(vocabulary: int) -> dict[str, WritableValue]:
    special = ["<unk>", "<s>", "</s>"]
    pieces = ["▁", *"etaoinshrdlucmfwgypbvkxqjz"]
    fixed = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    words = [*fixed, *(f"▁word{number}" for number in range(vocabulary - len(fixed)))]
    kinds = np.ones(vocabulary, np.int32)
    kinds[:3], kinds[3:259] = (2, 3, 3), 6
    scores = -np.maximum(np.arange(vocabulary, dtype=np.float32) - 259, 0)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def check(shape: Shape, quant_type: QuantType) -> None:
    sizes = [getattr(shape, field.name) for field in fields(shape) if field.name not in ("experts", "tied")]
    if min(sizes) < 1 or shape.vocabulary < 286:
        raise UsageError("sizes must be at least 1, and the vocabulary at least 286")
    if shape.experts < 0 or 0 < shape.experts < shape.experts_used:
        raise UsageError(f"{shape.experts_used} of {shape.experts} experts cannot be used; --experts must be larger")
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise UsageError(f"{shape.heads} heads and {shape.kv_heads} KV heads do not share a width of {shape.hidden}")
    for width in (shape.hidden, shape.ffn):
        if width % quant_type.info.block_size:
            raise UsageError(
                f"{quant_type.name} needs widths that are multiples of {quant_type.info.block_size}, not {width}"
            )


def write_shape(path: Path, name: str, shape: Shape, quant_type: QuantType, seed: int = 1, alike: bool = False) -> None:
    check(shape, quant_type)
    write_gguf(path, metadata(name, shape, quant_type), tensors(shape, quant_type, seed, alike))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model of random weights.")
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("type", choices=[quant_type.name for quant_type in LAYOUTS])
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--alike", action="store_true", help="write the same bytes in all layers, which is faster")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="overrides this size of the shape")
    arguments = parser.parse_args()
    given = {field.name: getattr(arguments, field.name) for field in fields(Shape)}
    shape = replace(SHAPES[arguments.name], **{name: value for name, value in given.items() if value is not None})
    started = time.perf_counter()
    write_shape(arguments.path, arguments.name, shape, QuantType[arguments.type], arguments.seed, arguments.alike)
    size_mb = arguments.path.stat().st_size / 1e6
    print(f"{arguments.path}: {size_mb:.0f} MB in {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
