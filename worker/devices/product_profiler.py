"""Measures matrix products by quant type on this CPU, for plans of models whose steps cannot be measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import median
from time import perf_counter
from typing import Final

import numpy as np

from llamaclust.core.profile import ProductTime
from llamaclust.kernels import _native
from llamaclust.kernels.cpu.quantize import QUANTIZED_TYPES, quantize
from llamaclust.model.quant_types import TILE_ROWS, QuantType
from llamaclust.wire.rpc.cache_flush import BYTES as SWEEP_BYTES
from llamaclust.wire.rpc.cache_flush import CacheFlush, largest_cache_bytes

ROWS: Final = (1, 4, 8, 32, 128)
"""Numbers of rows: 1 for a token, a few for drafts and several sequences, many for prompts."""
_FEW_ROWS: Final = 8
_WEIGHT_ROWS, _COLUMNS = 8192, 2048
_LEAST_BYTES: Final = 96 << 20  # Many bytes, because some parts of memory are faster than others.
_MOST_BYTES: Final = 160 << 20  # Maximum size of the float32 weights, activations and results.
_TRIES: Final = 5
_ENOUGH_S: Final = 0.3
"""Seconds, including cache flushes, after which a product is not measured again."""


def measure_products(
    quant_types: Iterable[int], threads: int, feature_level: str, free_bytes: int
) -> tuple[ProductTime, ...]:
    """Measures matrix products with each quant type, for tens of ms per type. Returns () if memory is short."""
    known = sorted({QuantType(number) for number in quant_types if number in QUANTIZED_TYPES})
    flush_bytes = min(largest_cache_bytes(), free_bytes - _MOST_BYTES)
    if not known or flush_bytes < SWEEP_BYTES:
        return ()
    flush = CacheFlush(flush_bytes)
    return tuple(time for kind in known for time in _of_type(kind, threads, feature_level, flush))


def _of_type(quant_type: QuantType, threads: int, feature_level: str, flush: CacheFlush) -> Iterator[ProductTime]:
    matrices = _matrices(quant_type, feature_level)
    source = np.random.default_rng(0)
    for rows in ROWS:
        x = source.standard_normal((rows, _COLUMNS), np.float32)
        used = matrices if rows <= _FEW_ROWS else matrices[:1]
        # Two ways of prefetching, of which a stage uses the faster one.
        ways = (False, True) if rows == 1 else (False,)
        products = [partial(_native.matmul_seconds, feature_level, used, x, threads, near) for near in ways]
        seconds = min(_median_s(product, flush if rows <= _FEW_ROWS else None) for product in products)
        yield ProductTime(int(quant_type), rows, seconds / sum(matrix.bytes for matrix in used))


def _median_s(product_s: Callable[[], float], flush: CacheFlush | None) -> float:
    seconds: list[float] = []
    begun_s = perf_counter()
    while len(seconds) < _TRIES and perf_counter() - begun_s < _ENOUGH_S:
        if flush is not None:
            flush.sweep()
        seconds.append(product_s())
    return median(seconds)


def _matrices(quant_type: QuantType, feature_level: str) -> list[_native.PackedMatrix]:
    weights = np.random.default_rng(0).standard_normal((TILE_ROWS, _COLUMNS), np.float32)
    tile_bytes = quant_type.info.tile_bytes(_COLUMNS)
    n_bytes = tile_bytes * (_WEIGHT_ROWS // TILE_ROWS)
    memory = _native.Memory(-(-_LEAST_BYTES // n_bytes) * n_bytes)
    _native.PackedMatrix(quant_type, TILE_ROWS, _COLUMNS, memory, 0).pack_rows(
        0, quantize(quant_type, weights, None, feature_level).reshape(-1)
    )
    memory.view.reshape(-1, tile_bytes)[1:] = memory.view[:tile_bytes]
    places = range(0, memory.bytes, n_bytes)
    return [_native.PackedMatrix(quant_type, _WEIGHT_ROWS, _COLUMNS, memory, place) for place in places]
