"""Random programs of single steps for comparisons of backends."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from llamaclust.model.program import (
    Attention,
    Buffer,
    Moe,
)
from llamaclust.model.quant_types import QuantType
from support.arithmetic.single_steps import (
    Case,
    Weight,
    normal,
    program_of,
    rows_at,
    splitter,
)

Float32 = NDArray[np.float32]


EXACT = 1e-11


def generator_of(*what: object) -> np.random.Generator:
    seed = zlib.crc32(repr(what).encode())
    print("seed", seed)
    return np.random.default_rng(seed)


def whole_numbers(generator: np.random.Generator, rows: int, width: int) -> Float32:
    """Returns activations that 8 bits hold exactly: integers up to 127, times a power of two per 256 channels."""
    values = generator.integers(-127, 128, (rows, width)).astype(np.float32)
    values[:, ::32] = 127
    powers = 2.0 ** generator.integers(-6, 6, (rows, -(-width // 256)))
    return (values * np.repeat(powers, 256, axis=1)[:, :width]).astype(np.float32)


def attention_case(heads: int, kv_heads: int, head_dim: int, chunks: list[range]) -> Case:
    """Builds attention whose hidden state is the concatenated queries, keys and values, equal on all backends."""
    generator = generator_of(heads, kv_heads, head_dim)
    query, out = Buffer("q", heads * head_dim), Buffer("out", heads * head_dim)
    key, value = Buffer("k", kv_heads * head_dim), Buffer("v", kv_heads * head_dim)
    x = Buffer("x", query.width + key.width + value.width)
    copies, weights = splitter(x, [query, key, value])
    attention = Attention(query, key, value, out, 1, heads, kv_heads, head_dim, scale=1 / head_dim**0.5)
    runs = [(rows_at(positions), 2 * normal(generator, len(positions), x.width)) for positions in chunks]
    return Case(program_of(x, out, *copies, attention), weights, runs)


def moe_case(quant_type: QuantType, experts: int, used: int, ffn: int) -> Case:
    """Builds experts with a router that reads 16 integers in float32, so that all backends choose the same experts."""
    generator, x, out = generator_of(quant_type, experts, used), Buffer("x", 256), Buffer("out", 256)
    router = np.zeros((experts, 256), np.float32)
    router[:, :16] = 0.01 * normal(generator, experts, 16)
    step = Moe(x, out, "router", "gate", "up", "down", experts, used, ffn)
    weights = {
        "router": Weight(router),
        "gate": Weight(normal(generator, experts, ffn, 256) * np.float32(1 / 16), quant_type),
        "up": Weight(normal(generator, experts, ffn, 256) * np.float32(1 / 16), quant_type),
        "down": Weight(normal(generator, experts, 256, ffn) * np.float32(1 / 16), quant_type),
    }
    hidden = [whole_numbers(generator, rows, 256) for rows in (1, 2, 9, 40)]
    return Case(program_of(x, out, step), weights, [(rows_at(range(len(part))), part) for part in hidden])
