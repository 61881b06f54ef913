"""Products with weights in wider tiles (`WIDER_TILES`) beside those in tiles of their own type, in turns.

    python benchmarks/quant_types/wide_tiles.py --threads 2 --pairs 9
    python benchmarks/quant_types/wide_tiles.py --threads 1 --cached

A row a type and number of tokens: bytes of the wider tiles and time of a product relative to the type's own (median,
least and most of pairs), and the shares of this machine's read bandwidth, measured between them, that both read at.
The same bits of both are checked first. A row takes some seconds. With `--cached`, decoding is what takes time,
whatever other programs do to memory.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring.options import listed, positive
from shape import random_matrix

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.kernels import _native
from llamaclust.kernels.probes import ReadProbe
from llamaclust.model.quant_types import WIDER_TILES, QuantType
from llamaclust.tools.bench.limits import Spread

SHAPE, CACHED_SHAPE = (5632, 2048), (256, 2048)
MEMORY_BYTES = 256 << 20
READ_S = 0.1
MACS = 4e9


@dataclass(frozen=True, slots=True)
class Way:
    """Matrices of the same weights, each in its own place."""

    matrices: list[_native.PackedMatrix]
    shape: tuple[int, int]

    @property
    def matrix_bytes(self) -> int:
        return self.matrices[0].bytes

    def seconds(self, x: NDArray[np.float32], level: str, threads: int) -> float:
        """Of a product with one matrix; for one row, with the faster way to prefetch."""
        rows, cols = self.shape
        count = max(1, int(MACS // (rows * cols * len(x))))
        used = list(islice(cycle(self.matrices), count))
        ways = (False, True) if len(x) == 1 else (False,)
        return min(_native.matmul_seconds(level, used, x, threads, near) for near in ways) / len(used)


def way_of(quant_type: QuantType, tile_type: QuantType, *, is_cached: bool) -> Way:
    shape = CACHED_SHAPE if is_cached else SHAPE
    data = np.frombuffer(random_matrix(np.random.default_rng(0), quant_type, shape), np.uint8)
    matrices = []
    for _ in range(1 if is_cached else MEMORY_BYTES // len(data)):
        matrices.append(_native.PackedMatrix(tile_type, *shape))
        matrices[-1].pack_rows(0, data, quant_type)
    return Way(matrices, shape)


def row_of(quant_type: QuantType, own: Way, wide: Way, tokens: int, options: argparse.Namespace) -> str:
    x = np.random.default_rng(1).standard_normal((tokens, own.shape[1])).astype(np.float32)
    level, read = options.level, ReadProbe(options.threads)
    ratios: list[float] = []
    shares: tuple[list[float], list[float]] = ([], [])
    for way in (own, wide):
        way.seconds(x, level, options.threads)
    for _ in range(options.pairs):
        seconds = [way.seconds(x, level, options.threads) for way in (own, wide)]
        ratios.append(seconds[1] / seconds[0])
        read_gb_s = read.measure(READ_S)
        for share, way, taken_s in zip(shares, (own, wide), seconds, strict=True):
            share.append(way.matrix_bytes / taken_s / 1e9 / read_gb_s)
    bytes_ratio = wide.matrix_bytes / own.matrix_bytes
    read_shares = "  ".join(f"{median(share):.2f}" for share in shares)
    return f"{quant_type.name:8} {tokens:6}   {bytes_ratio:5.2f}   {Spread.of(ratios):.2f}   {read_shares}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    levels = _native.available_levels()
    parser.add_argument("--tokens", type=listed(positive), default="1,8,512", help="%(default)s by default")
    parser.add_argument("--threads", type=positive, default=2, help="%(default)s by default")
    parser.add_argument("--pairs", type=positive, default=9, help="%(default)s by default")
    parser.add_argument("--cached", action="store_true", help="one matrix that stays in a core's cache")
    parser.add_argument("--level", choices=levels, default=levels[-1], help="feature level; %(default)s by default")
    options = parser.parse_args(arguments)
    print("type     tokens   bytes   time                of read: own, wider")
    for quant_type, tile_type in WIDER_TILES.items():
        own, wide = (way_of(quant_type, tile, is_cached=options.cached) for tile in (quant_type, tile_type))
        x = np.random.default_rng(2).standard_normal((3, own.shape[1])).astype(np.float32)
        results = [_native.matmul(options.level, way.matrices[0], x, options.threads) for way in (own, wide)]
        assert results[0].tobytes() == results[1].tobytes(), quant_type
        for tokens in options.tokens:
            print(row_of(quant_type, own, wide, tokens, options), flush=True)


if __name__ == "__main__":
    with ends_in_one_line():
        main(sys.argv[1:])
