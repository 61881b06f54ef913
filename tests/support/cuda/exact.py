"""Computes results on the CPU backend, and compares a GPU's results with them bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import Memory, PackedMatrix
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import write_gguf
from llamaclust.model.program import Program
from support.arithmetic.matmul_cases import check_equal_bits
from support.arithmetic.single_steps import Weight
from support.models.tiny_quantizers import quantize

Float32 = NDArray[np.float32]

LIMITS = StageLimits(max_batch_tokens=64, max_outputs=64, max_sequences=8, max_context_tokens=4096, kv_blocks=260)


def random_source() -> np.random.Generator:
    """Returns a generator with a new random seed, and prints the seed."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def awkward(source: np.random.Generator, rows: int, width: int) -> Float32:
    """Returns rows that hold, in turn, ordinary numbers, all magnitudes, subnormals, zeros, and infinities and NaN."""
    x = source.standard_normal((rows, width), np.float32)
    signs = np.where(source.random((rows, width)) < 0.5, -1, 1)
    x[1::5] = (signs * 10.0 ** source.uniform(-38, 18, x.shape))[1::5]
    x[2::5] = (signs * 10.0 ** source.uniform(-45, -37, x.shape))[2::5]
    x[3::5, ::3], x[3::5, 1::3] = 0.0, -0.0
    for row in range(4, rows, 5):
        specials = source.choice(np.array([np.inf, -np.inf, np.nan, 1e38], np.float32), 3)
        x[row, source.integers(0, width, 3)] = specials
    return x


def same_bits(found: Float32, wanted: Float32, *where: object) -> None:
    """Checks that bits are equal; all NaN count as equal, but zeros of different signs do not."""
    check_equal_bits(*(np.where(np.isnan(x), np.float32(np.nan), x) for x in (found, wanted)), *where)


def on_cpu(
    program: Program,
    weights: Mapping[str, Weight],
    batch: Batch,
    hidden: Float32 | None,
    context_tokens: int = LIMITS.max_context_tokens,
) -> Float32:
    """Returns the CPU backend's result of a program."""
    limits = replace(LIMITS, max_context_tokens=context_tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.gguf"
        write_gguf(path, {}, [weight.source(name) for name, weight in weights.items()])
        stage = CpuBackend(1).load(program, dict(open_model(path).tensors), limits, lambda done_bytes: None)
        try:
            return stage.run(batch, hidden).copy()
        finally:
            stage.close()


def tiles_of(weight: Weight) -> tuple[NDArray[np.uint8], int]:
    """Returns the tiles of a matrix [rows, columns] in the CPU's packed layout, and the bytes of one tile."""
    rows, columns = weight.values.shape
    n_bytes = PackedMatrix.shape_only(int(weight.quant_type), rows, columns).bytes
    memory = Memory(n_bytes)
    packed = PackedMatrix(int(weight.quant_type), rows, columns, memory, 0)
    packed.pack_rows(0, quantize(weight.values, weight.quant_type))
    return memory.view.copy(), n_bytes // -(-rows // 16)
