from __future__ import annotations

import argparse
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median

import numpy as np
from runner.case import Case, Group, Measures, option
from runner.models import types_of
from runner.options import chosen, listed, positive
from shape import LAYOUTS, random_matrix

from llamaclust.core.errors import UsageError
from llamaclust.kernels import _native, probes
from llamaclust.kernels.probes import ReadProbe
from llamaclust.model.quant_types import ActivationFormat, QuantType

MEMORY_BYTES = 256 << 20
"""Bytes of weights that a measurement with few tokens reads. Caches are several times smaller."""
WORK = 4e9
"""Number of multiply-adds in a measurement with many tokens."""
_READ_S, _PEAK_S = 0.2, 0.05
FAR, NEAR = "far", "near"
_FEW_TOKENS = 2  # Products of more tokens have only one way to prefetch weights.
_MOST_THREADS = 1024
_LEAST_WEIGHTS = 1 << 16


def shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    rows, cols = (int(found[1]), int(found[2])) if found else (0, 0)
    if rows * cols < _LEAST_WEIGHTS:
        what = f"ROWSxCOLS with {_LEAST_WEIGHTS} weights or more, such as 5632x2048"
        raise argparse.ArgumentTypeError(f"{text!r}: give {what}")
    return rows, cols


_LEVELS = tuple(_native.available_levels())


@dataclass(frozen=True)
class Kernels(Case):
    """Compares the speed of matrix products with this machine's limits in the same minute.
    Figures are bytes of weights and multiply-adds per second, and their shares of the CPU's limits. With one token, the
    speed should be near the read bandwidth. With hundreds of tokens, it should be near the multiply-add peak (of 8-bit
    integers, or float32 for float weights). Limits are measured right before and after a product."""

    types: tuple[QuantType, ...] = option(tuple(LAYOUTS), "types of weights, or all", types_of)
    shapes: tuple[tuple[int, int], ...] = option(((5632, 2048),), "shapes of matrices, as ROWSxCOLS", listed(shape))
    tokens: tuple[int, ...] = option(
        (1, 4, 8, 16, 64, 512), "numbers of tokens (rows of activations)", listed(positive)
    )
    levels: tuple[str, ...] = option(
        _LEVELS[-1:], "CPU feature levels", listed(chosen("feature level", {level: level for level in _LEVELS}))
    )
    prefetch: tuple[str, ...] = option(
        (FAR,),
        "ways to prefetch weights for one or two tokens: far, near",
        listed(chosen("way to prefetch", {FAR: FAR, NEAR: NEAR})),
    )
    threads: int = option(2, "number of threads that compute", positive)

    def __post_init__(self) -> None:
        if self.threads > _MOST_THREADS:
            raise UsageError(f"--threads is {self.threads}, but the limit is {_MOST_THREADS}")
        if all(cols % each.info.block_size for each in self.types for _, cols in self.shapes):
            least = min(each.info.block_size for each in self.types)
            raise UsageError(
                f"the columns of --shapes fit no type of --types; give a number of columns that {least} divides"
            )

    async def groups(self) -> AsyncIterator[Group]:
        read = ReadProbe(self.threads)
        for quant_type, (rows, cols) in product(self.types, self.shapes):
            if cols % quant_type.info.block_size:
                continue
            matrices = matrices_of(quant_type, rows, cols, quant_type)
            for level, tokens, way in product(self.levels, self.tokens, self.prefetch):
                if way == FAR or tokens <= _FEW_TOKENS:
                    name = f"{quant_type.name:7} {rows}x{cols} {level} {tokens:3} {way}"
                    kernel = Kernel(quant_type, matrices, rows, cols, level, self.threads, tokens, way == NEAR, read)
                    yield Group("", {name: partial(kernel.measure)})


@dataclass(frozen=True, slots=True)
class Kernel:
    quant_type: QuantType
    matrices: list[_native.PackedMatrix]
    rows: int
    cols: int
    level: str
    threads: int
    tokens: int
    is_near: bool
    read: ReadProbe

    async def measure(self, turn: int) -> Measures:
        x = np.random.default_rng(1).standard_normal((self.tokens, self.cols)).astype(np.float32)
        macs = self.rows * self.cols * self.tokens
        used = self.matrices[: max(1, min(len(self.matrices), round(WORK / macs)))]
        before = self._limits()
        times = [_native.matmul_seconds(self.level, used, x, self.threads, near=self.is_near) for _ in range(3)]
        seconds, after = median(times) / len(used), self._limits()
        gb_s = self.rows * self.quant_type.info.row_bytes(self.cols) / seconds / 1e9
        gmac_s = macs / seconds / 1e9
        of_read, of_peak = (2 * speed / (a + b) for speed, a, b in zip((gb_s, gmac_s), before, after, strict=True))
        return {"GB/s": gb_s, "of read": of_read, "GMAC/s": gmac_s, "of peak": of_peak}

    def _limits(self) -> tuple[float, float]:
        floats = self.quant_type.info.activation is ActivationFormat.F32
        return self.read.measure(_READ_S), (probes.fma_peak if floats else probes.int8_peak)(self.threads, _PEAK_S)


def matrices_of(
    tile_type: QuantType, rows: int, cols: int, quant_type: QuantType, least_bytes: int = MEMORY_BYTES
) -> list[_native.PackedMatrix]:
    data = np.frombuffer(random_matrix(np.random.default_rng(0), quant_type, (rows, cols)), np.uint8)
    matrices = []
    for _ in range(max(1, least_bytes // len(data))):
        matrices.append(_native.PackedMatrix(tile_type, rows, cols))
        matrices[-1].pack_rows(0, data, quant_type)
    return matrices
