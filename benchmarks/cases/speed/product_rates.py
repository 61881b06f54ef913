from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from cases.speed.kernels import matrices_of
from runner.case import Case, Group, Measures, option
from runner.models import types_of
from shape import LAYOUTS

from llamaclust.kernels import _native, probes
from llamaclust.model.quant_types import QuantType

_COLUMNS = 2048
_CACHED_BYTES = 256 << 10
_TILE_ROWS = 16
_MANY_ROWS = 512
_RUN_S, _PEAK_S = 0.02, 0.02


@dataclass(frozen=True)
class ProductRates(Case):
    """Measures rates of products by weight type, relative to the 8-bit peak, for cluster/planner/product_times.py.
    Weights are in the core's cache, and one thread computes. `peak_share` is the share of the peak with many rows.
    `decode_macs` is the extra time per weight with one row, in units of one multiply-accumulate at the peak."""

    rounds = 7
    types: tuple[QuantType, ...] = option(tuple(LAYOUTS), "types of weights, or all", types_of)

    async def groups(self) -> AsyncIterator[Group]:
        for quant_type in self.types:
            rows = max(4, _CACHED_BYTES // quant_type.info.tile_bytes(_COLUMNS)) * _TILE_ROWS
            (matrix,) = matrices_of(quant_type, rows, _COLUMNS, quant_type, 0)
            yield Group("", {quant_type.name: partial(self._measure, matrix, rows * _COLUMNS)})

    async def _measure(self, matrix: _native.PackedMatrix, weights: int, turn: int) -> Measures:
        peak = 1e9 * probes.int8_peak(1, _PEAK_S)
        one, many = (_weight_s(matrix, weights, count) for count in (1, _MANY_ROWS))
        return {"decode_macs": max(0.0, peak * (one - many)), "peak_share": 1 / (peak * many)}


def _weight_s(matrix: _native.PackedMatrix, weights: int, rows: int) -> float:
    level, x = _native.available_levels()[-1], np.random.default_rng(1).standard_normal((rows, _COLUMNS))
    once = _native.matmul_seconds(level, [matrix], x.astype(np.float32), 1)
    times = max(1, min(1000, round(_RUN_S / max(once, 1e-6))))
    return _native.matmul_seconds(level, [matrix] * times, x.astype(np.float32), 1) / (times * weights * rows)
