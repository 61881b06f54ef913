"""Speed of the matrix products, beside this machine's own limits measured in the same minute.

    python benchmarks/kernels.py --types Q4_K,Q8_0 --shapes 5632x2048 --tokens 1,8,512 --threads 2 --json kernels.jsonl

A row a type, shape, level and number of tokens: bytes of weights and multiply-adds a second, and their shares of the
read bandwidth and of the multiply-add peak of this CPU (8-bit integers; float32 for float weights). One token should be
near the first limit, hundreds near the second; of the two ways to prefetch, a process takes the one found faster.
Limits and kernels are measured in turns; a share is the median over rounds of kernel to the mean of the limits right
before and right after it. A row takes a few seconds, all types at all default sizes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
from measuring.options import chosen, listed, positive
from shape import LAYOUTS, random_matrix

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.kernels import _native, probes
from llamaclust.kernels.probes import ReadProbe
from llamaclust.model.quant_types import ActivationFormat, QuantType
from llamaclust.tools.bench.limits import Pair, Spread

MEMORY_BYTES = 256 << 20
"""Weights that a measurement of few tokens goes through, several times what caches hold."""
WORK = 4e9
"""Multiply-adds that a measurement of many tokens does."""
READ_S, PEAK_S = 0.2, 0.05
FAR, NEAR = "far", "near"
FEW_TOKENS = 2  # of products that know both ways to prefetch

_MOST_THREADS = 1024
_LEAST_WEIGHTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured: `rows` x `cols` weights times `tokens` rows of activations."""

    quant_type: QuantType
    rows: int
    cols: int
    level: str
    threads: int
    tokens: int
    prefetch: str

    @property
    def weight_bytes(self) -> int:
        return self.rows * self.quant_type.info.row_bytes(self.cols)

    @property
    def products(self) -> int:
        return self.rows * self.cols * self.tokens


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: medians, and the shares' least and most."""

    quant_type: str
    rows: int
    cols: int
    level: str
    threads: int
    tokens: int
    prefetch: str
    gb_s: float
    gmac_s: float
    read_share: Spread
    peak_share: Spread

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.cols}"
        return (
            f"{self.quant_type:7} {shape:>12} {self.level:>11} {self.threads:7} {self.tokens:6} {self.prefetch:>8} "
            f"{self.gb_s:8.1f} {self.read_share:.2f} {self.gmac_s:8.1f} {self.peak_share:.2f}"
        )


HEADER = "type           shape       level threads tokens prefetch     GB/s of read              GMAC/s of peak"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the kernel of a setup is compared with."""

    read: ReadProbe
    setup: Setup

    def gb_s(self) -> float:
        return self.read.measure(READ_S)

    def gmac_s(self) -> float:
        floats = self.setup.quant_type.info.activation is ActivationFormat.F32
        return (probes.fma_peak if floats else probes.int8_peak)(self.setup.threads, PEAK_S)


def matrices_of(setup: Setup) -> list[_native.PackedMatrix]:
    """As many matrices as memory and not a cache must serve; they hold the same weights, each in its own place."""
    data = np.frombuffer(random_matrix(np.random.default_rng(0), setup.quant_type, (setup.rows, setup.cols)), np.uint8)
    matrices = []
    for _ in range(max(2, MEMORY_BYTES // setup.weight_bytes)):
        matrices.append(_native.PackedMatrix(setup.quant_type, setup.rows, setup.cols))
        matrices[-1].pack_rows(0, data)
    return matrices


def measure(setup: Setup, matrices: list[_native.PackedMatrix], limits: Limits, rounds: int) -> Row:
    x = np.random.default_rng(1).standard_normal((setup.tokens, setup.cols)).astype(np.float32)
    used = matrices[: max(1, min(len(matrices), round(WORK / setup.products)))]
    near = setup.prefetch == NEAR
    before, reads, peaks = (limits.gb_s(), limits.gmac_s()), [], []
    for _ in range(rounds):
        times = [_native.matmul_seconds(setup.level, used, x, setup.threads, near=near) for _ in range(3)]
        seconds = median(times) / len(used)
        after = (limits.gb_s(), limits.gmac_s())
        reads.append(Pair(setup.weight_bytes / seconds / 1e9, before[0], after[0]))
        peaks.append(Pair(setup.products / seconds / 1e9, before[1], after[1]))
        before = after
    return Row(
        quant_type=setup.quant_type.name,
        rows=setup.rows,
        cols=setup.cols,
        level=setup.level,
        threads=setup.threads,
        tokens=setup.tokens,
        prefetch=setup.prefetch,
        gb_s=median(pair.speed for pair in reads),
        gmac_s=median(pair.speed for pair in peaks),
        read_share=Spread.of(pair.share for pair in reads),
        peak_share=Spread.of(pair.share for pair in peaks),
    )


def measure_all(options: argparse.Namespace) -> Iterator[Row]:
    read = ReadProbe(options.threads)
    for quant_type in options.types:
        for rows, cols in options.shapes:
            if cols % quant_type.info.block_size != 0:
                continue
            matrices = matrices_of(Setup(quant_type, rows, cols, "", 1, 1, FAR))
            for level in options.levels:
                for tokens, prefetch in product(options.tokens, options.prefetch):
                    if prefetch == NEAR and tokens > FEW_TOKENS:
                        continue
                    setup = Setup(quant_type, rows, cols, level, options.threads, tokens, prefetch)
                    yield measure(setup, matrices, Limits(read, setup), options.rounds)


def shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    rows, cols = (int(found[1]), int(found[2])) if found else (0, 0)
    if rows * cols < _LEAST_WEIGHTS:
        what = f"ROWSxCOLS with {_LEAST_WEIGHTS} weights or more, such as 5632x2048"
        raise argparse.ArgumentTypeError(f"{text!r}: give {what}")
    return rows, cols


def parser_of_options() -> argparse.ArgumentParser:
    types, levels = {quant_type.name: quant_type for quant_type in LAYOUTS}, _native.available_levels()
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument(
        "--types",
        type=listed(chosen("type", types)),
        default=list(LAYOUTS),
        help=f"weight types, separated by commas: {', '.join(types)}; all by default",
    )
    parser.add_argument(
        "--shapes",
        type=listed(shape),
        default="5632x2048",
        help="ROWSxCOLS, separated by commas; %(default)s by default",
    )
    parser.add_argument(
        "--tokens",
        type=listed(positive),
        default="1,4,8,16,64,512",
        help="rows of activations, separated by commas; %(default)s by default",
    )
    parser.add_argument(
        "--levels",
        type=listed(chosen("feature level", {level: level for level in levels})),
        default=levels[-1],
        help=f"feature levels out of {', '.join(levels)}; %(default)s by default",
    )
    parser.add_argument(
        "--prefetch",
        type=listed(chosen("way to prefetch", {way: way for way in (FAR, NEAR)})),
        default=FAR,
        help=f"how weights of one or two tokens are prefetched, out of {FAR}, {NEAR}; %(default)s by default",
    )
    parser.add_argument("--threads", type=positive, default=2, help="%(default)s by default")
    parser.add_argument(
        "--rounds", type=positive, default=5, help="turns of limits and kernels; %(default)s by default"
    )
    parser.add_argument("--json", type=Path, help="also write the rows there, a JSON object a line")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of_options()
    options = parser.parse_args(arguments)
    if options.threads > _MOST_THREADS:
        parser.error(f"--threads {options.threads}: {_MOST_THREADS} at most")
    fitting = [
        (quant_type, cols)
        for quant_type in options.types
        for _, cols in options.shapes
        if cols % quant_type.info.block_size == 0
    ]
    if not fitting:
        least = min(quant_type.info.block_size for quant_type in options.types)
        parser.error(f"no type has such columns: they come in steps of {least} or more")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    print(HEADER, flush=True)
    with options.json.open("w") if options.json is not None else nullcontext() as file:
        for row in measure_all(options):
            print(row, flush=True)
            if file is not None:
                print(json.dumps(asdict(row)), file=file, flush=True)


if __name__ == "__main__":
    with ends_in_one_line():
        main(sys.argv[1:])
