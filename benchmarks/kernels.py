"""Speed of the matrix products, beside this machine's own limits measured in the same minute.

    python benchmarks/kernels.py --types Q4_K,Q8_0 --shapes 5632x2048 --tokens 1,8,512 --threads 2 --json kernels.jsonl

A row a type, shape, level and number of tokens: bytes of weights and multiply-adds a second, and their shares of the
read bandwidth and of the multiply-add peak (8-bit integers; float32 for float weights). One token should be near the
first limit, hundreds near the second. Limits and kernels are measured in turns and the best of each counts, since other
work on the machine comes and goes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from shape import random_matrix

from llamaclust.kernels import probes
from llamaclust.kernels.cpu import _native
from llamaclust.model.quant_types import ActivationFormat, QuantType

TYPES = (
    "F32,F16,BF16,Q8_0,Q4_0,Q4_1,Q5_0,Q5_1,Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,IQ4_NL,IQ4_XS,MXFP4,TQ2_0,TQ1_0,"
    "IQ2_XXS,IQ2_XS,IQ2_S,IQ3_XXS,IQ3_S,IQ1_S,IQ1_M"
)
MEMORY_BYTES = 256 << 20
"""Weights that a measurement of few tokens goes through, several times what caches hold."""
WORK = 4e9
"""Multiply-adds that a measurement of many tokens does."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured: `rows` x `cols` weights times `tokens` rows of activations."""

    quant_type: QuantType
    rows: int
    cols: int
    level: str
    threads: int
    tokens: int

    @property
    def weight_bytes(self) -> int:
        return self.rows * self.quant_type.info.row_bytes(self.cols)

    @property
    def products(self) -> int:
        return self.rows * self.cols * self.tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """10^9 bytes and 10^9 multiply-adds a second."""

    read_gb_s: float
    peak_gmac_s: float

    def better(self, other: Limits) -> Limits:
        return Limits(max(self.read_gb_s, other.read_gb_s), max(self.peak_gmac_s, other.peak_gmac_s))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    quant_type: str
    rows: int
    cols: int
    level: str
    threads: int
    tokens: int
    gb_s: float
    gmac_s: float
    read_share: float
    peak_share: float

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.cols}"
        return (
            f"{self.quant_type:5} {shape:>12} {self.level:>11} {self.threads:7} {self.tokens:6} {self.gb_s:8.1f} "
            f"{self.read_share:7.2f} {self.gmac_s:8.1f} {self.peak_share:7.2f}"
        )


HEADER = "type         shape       level threads tokens     GB/s of read   GMAC/s of peak"


def measure_limits(setup: Setup) -> Limits:
    peak = probes.fma_peak if setup.quant_type.info.activation is ActivationFormat.F32 else probes.int8_peak
    return Limits(probes.read_bandwidth(setup.threads, 0.3), peak(setup.threads, 0.1))


def random_weights(setup: Setup) -> NDArray[np.uint8]:
    """The bytes of the weights as a model file holds them."""
    generator, shape = np.random.default_rng(0), (setup.rows, setup.cols)
    if setup.quant_type in (QuantType.F32, QuantType.BF16):
        values = generator.standard_normal(shape, np.float32)
        return (values if setup.quant_type is QuantType.F32 else values.view(np.uint16)[:, 1::2].copy()).view(np.uint8)
    return np.frombuffer(random_matrix(generator, setup.quant_type, shape), np.uint8)


def matrices_of(setup: Setup) -> list[_native.PackedMatrix]:
    """As many matrices as memory and not a cache must serve; they hold the same weights, each in its own place."""
    data = random_weights(setup).reshape(-1)
    matrices = []
    for _ in range(max(2, MEMORY_BYTES // setup.weight_bytes)):
        matrices.append(_native.PackedMatrix(setup.quant_type, setup.rows, setup.cols))
        matrices[-1].pack_rows(0, data)
    return matrices


def measure(setup: Setup, matrices: list[_native.PackedMatrix], rounds: int) -> Row:
    x = np.random.default_rng(1).standard_normal((setup.tokens, setup.cols)).astype(np.float32)
    used = matrices[: max(1, min(len(matrices), round(WORK / setup.products)))]
    limits, best = Limits(0, 0), float("inf")
    for _ in range(rounds):
        limits = limits.better(measure_limits(setup))
        best = min(best, *(_native.matmul_seconds(setup.level, used, x, setup.threads) for _ in range(3)))
    seconds = best / len(used)
    gb_s, gmac_s = setup.weight_bytes / seconds / 1e9, setup.products / seconds / 1e9
    return Row(
        quant_type=setup.quant_type.name,
        rows=setup.rows,
        cols=setup.cols,
        level=setup.level,
        threads=setup.threads,
        tokens=setup.tokens,
        gb_s=gb_s,
        gmac_s=gmac_s,
        read_share=gb_s / limits.read_gb_s,
        peak_share=gmac_s / limits.peak_gmac_s,
    )


def measure_all(options: argparse.Namespace) -> Iterator[Row]:
    for quant_type in options.types:
        for rows, cols in options.shapes:
            if cols % quant_type.info.block_size != 0:
                continue
            matrices = matrices_of(Setup(quant_type, rows, cols, "", 1, 1))
            for level in options.levels:
                for tokens in options.tokens:
                    setup = Setup(quant_type, rows, cols, level, options.threads, tokens)
                    yield measure(setup, matrices, options.rounds)


def shape(text: str) -> tuple[int, int]:
    rows, cols = text.split("x")
    return int(rows), int(cols)


def parse(arguments: list[str]) -> argparse.Namespace:
    levels = _native.available_levels()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", default=TYPES, help="weight types, separated by commas")
    parser.add_argument("--shapes", default="5632x2048", help="ROWSxCOLS, separated by commas")
    parser.add_argument("--tokens", default="1,4,8,16,64,512", help="rows of activations, separated by commas")
    parser.add_argument("--levels", default=levels[-1], help=f"feature levels out of {', '.join(levels)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="turns of limits and kernels; the best counts")
    parser.add_argument("--json", type=Path, help="also write the rows there, a JSON object a line")
    options = parser.parse_args(arguments)
    try:
        options.types = [QuantType[name] for name in options.types.split(",")]
        options.shapes = [shape(text) for text in options.shapes.split(",")]
        options.tokens = [int(text) for text in options.tokens.split(",")]
    except (KeyError, ValueError) as error:
        parser.error(f"not understood: {error}")
    options.levels = options.levels.split(",")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    print(HEADER)
    lines = []
    for row in measure_all(options):
        print(row, flush=True)
        lines.append(json.dumps(asdict(row)) + "\n")
    if options.json is not None:
        options.json.write_text("".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
