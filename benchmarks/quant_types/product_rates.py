"""Rates of products by quant type, relative to the 8-bit peak of a core: the table of cluster/planner/product_times.py.

    python benchmarks/quant_types/product_rates.py [--types Q4_K,IQ1_S] [--rounds 7]

Weights lie in the core's own cache, one thread. With one row, a weight takes the time of `decode_macs` 8-bit
multiply-accumulates and of one product; with many rows, products run at `peak_share` of the peak. Peak and products are
measured in turns; printed are medians. A second a type.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from measuring.options import chosen, listed, positive
from shape import LAYOUTS, random_matrix

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.kernels import _native, probes
from llamaclust.model.quant_types import QuantType

_COLUMNS = 2048
_CACHED_BYTES = 256 << 10
_TILES = 16  # rows of a matrix come in so many
_MANY_ROWS = 512
_RUN_S, _PEAK_S = 0.02, 0.02


def weight_s(matrix: _native.PackedMatrix, weights: int, rows: int, level: str) -> float:
    """Seconds of a weight and a row."""
    x = np.random.default_rng(1).standard_normal((rows, _COLUMNS)).astype(np.float32)
    once = _native.matmul_seconds(level, [matrix], x, 1)
    times = max(1, min(1000, round(_RUN_S / max(once, 1e-6))))
    return _native.matmul_seconds(level, [matrix] * times, x, 1) / (times * weights * rows)


def rates_of(quant_type: QuantType, rounds: int) -> tuple[float, float]:
    """(decode_macs, peak_share)."""
    tile_bytes = quant_type.info.tile_bytes(_COLUMNS)
    rows = max(4, _CACHED_BYTES // tile_bytes) * _TILES
    matrix = _native.PackedMatrix(quant_type, rows, _COLUMNS)
    matrix.pack_rows(0, np.frombuffer(random_matrix(np.random.default_rng(0), quant_type, (rows, _COLUMNS)), np.uint8))
    level, decoded, shares = _native.available_levels()[-1], [], []
    for _ in range(rounds):
        peak = 1e9 * probes.int8_peak(1, _PEAK_S)
        one, many = (weight_s(matrix, rows * _COLUMNS, count, level) for count in (1, _MANY_ROWS))
        shares.append(1 / (peak * many))
        decoded.append(peak * (one - many))
    return max(0.0, median(decoded)), median(shares)


def main(types: Sequence[QuantType], rounds: int) -> None:
    print("type     decode_macs  peak_share")
    for quant_type in types:
        decode_macs, peak_share = rates_of(quant_type, rounds)
        print(f"{quant_type.name:8} {decode_macs:11.1f} {peak_share:11.2f}", flush=True)


if __name__ == "__main__":
    with ends_in_one_line():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        known = {quant_type.name: quant_type for quant_type in LAYOUTS}
        parser.add_argument("--types", type=listed(chosen("type", known)), default=list(LAYOUTS), help="all by default")
        parser.add_argument("--rounds", type=positive, default=7, help="%(default)s by default")
        given = parser.parse_args()
        main(given.types, given.rounds)
