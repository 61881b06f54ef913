"""Weights of every type that ggml computes with, as float32, with the float operations in the order of ggml's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llamaclust.kernels.reference import i_quants, k_quants, simple_quants
from llamaclust.kernels.reference.bits import Bytes, Float32, words
from llamaclust.model.quant_types import QuantType


def _f32(blocks: Bytes) -> Float32:
    return words(blocks, np.float32).astype(np.float32)


def _f16(blocks: Bytes) -> Float32:
    return words(blocks, np.float16).astype(np.float32)


def _bf16(blocks: Bytes) -> Float32:
    return (words(blocks, np.uint16).astype(np.uint32) << 16).view(np.float32)


_DEQUANTIZERS: dict[QuantType, Callable[[Bytes], Float32]] = {
    QuantType.F32: _f32,
    QuantType.F16: _f16,
    QuantType.BF16: _bf16,
    QuantType.Q4_0: simple_quants.q4_0,
    QuantType.Q4_1: simple_quants.q4_1,
    QuantType.Q5_0: simple_quants.q5_0,
    QuantType.Q5_1: simple_quants.q5_1,
    QuantType.Q8_0: simple_quants.q8_0,
    QuantType.IQ4_NL: simple_quants.iq4_nl,
    QuantType.MXFP4: simple_quants.mxfp4,
    QuantType.NVFP4: simple_quants.nvfp4,
    QuantType.Q1_0: simple_quants.q1_0,
    QuantType.Q2_K: k_quants.q2_k,
    QuantType.Q3_K: k_quants.q3_k,
    QuantType.Q4_K: k_quants.q4_k,
    QuantType.Q5_K: k_quants.q5_k,
    QuantType.Q6_K: k_quants.q6_k,
    QuantType.TQ1_0: k_quants.tq1_0,
    QuantType.TQ2_0: k_quants.tq2_0,
    QuantType.IQ1_S: i_quants.iq1_s,
    QuantType.IQ1_M: i_quants.iq1_m,
    QuantType.IQ2_XXS: i_quants.iq2_xxs,
    QuantType.IQ2_XS: i_quants.iq2_xs,
    QuantType.IQ2_S: i_quants.iq2_s,
    QuantType.IQ3_XXS: i_quants.iq3_xxs,
    QuantType.IQ3_S: i_quants.iq3_s,
    QuantType.IQ4_XS: i_quants.iq4_xs,
}

SUPPORTED_TYPES = frozenset(_DEQUANTIZERS)
"""What can be dequantized, and so what the reference backend computes with."""


def dequantize(quant_type: QuantType, data: bytes | bytearray | Bytes, count: int) -> Float32:
    """`count` weights in whole blocks of a type in SUPPORTED_TYPES -> float32 [count]."""
    info = quant_type.info
    raw = np.frombuffer(data, np.uint8)
    assert count % info.block_size == 0 and len(raw) == info.row_bytes(count), (quant_type, count, len(raw))
    blocks = raw.reshape(-1, info.block_bytes)
    return _DEQUANTIZERS[quant_type](blocks).reshape(count)
