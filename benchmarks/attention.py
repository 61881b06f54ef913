"""Speed of attention, beside this machine's own limits measured in the same minute.

    python benchmarks/attention.py --kv f16,q8_0 --depths 8192 --rows 1,512 --heads 32/4x64 --json attention.jsonl

A row a KV type, level, depth and number of rows that are computed together behind so many positions: bytes of keys and
values and multiply-adds a second, and their shares of the read bandwidth and of the float32 multiply-add peak. One row
should be near the first limit, hundreds near the second. Limits and kernels are measured in turns; a share is the
median over rounds of kernel to the mean of the limits right before and right after it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from shape import random_matrix

from llamaclust.core.limits import StageLimits
from llamaclust.kernels import _native, probes
from llamaclust.kernels.backend import Batch
from llamaclust.kernels.cpu.backend import CpuBackend, CpuStage
from llamaclust.kernels.probes import ReadProbe
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.gguf.writer import TensorSource, write_gguf
from llamaclust.model.kv_type import KvType
from llamaclust.model.program import KV_BLOCK_TOKENS, Attention, Buffer, MatMul, Program
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.bench.limits import Pair, Spread

LAYERS = 22
"""Enough that memory and not a cache must serve a long context."""
_INPUT = Buffer("input", 32)
_READ_S, _PEAK_S = 0.2, 0.1


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, KV heads, channels of a head."""

    query: int
    kv: int
    dim: int


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured: `rows` rows of one sequence behind `depth` positions, in each of LAYERS layers."""

    kv_type: KvType
    level: str
    threads: int
    depth: int
    rows: int

    def read_bytes(self, heads: Heads) -> int:
        """Keys and values, each once."""
        return LAYERS * heads.kv * self.kv_type.pair_bytes(heads.dim) * (self.depth + self.rows)

    def products(self, heads: Heads) -> int:
        seen = self.rows * self.depth + self.rows * (self.rows + 1) // 2
        return LAYERS * 2 * heads.query * heads.dim * seen


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: medians, and the shares' least and most."""

    kv_type: str
    level: str
    threads: int
    depth: int
    rows: int
    ms: float
    gb_s: float
    gmac_s: float
    read_share: Spread
    peak_share: Spread

    def __str__(self) -> str:
        return (
            f"{self.kv_type:5} {self.level:>11} {self.threads:7} {self.depth:6} {self.rows:5} {self.ms:9.2f} "
            f"{self.gb_s:8.1f} {self.read_share:.2f} {self.gmac_s:8.1f} {self.peak_share:.2f}"
        )


HEADER = "KV          level threads  depth  rows        ms     GB/s of read              GMAC/s of peak"


def program_of(heads: Heads, kv_type: KvType) -> Program:
    """Small products that make queries, keys and values, then attention."""
    out = Buffer("out", heads.query * heads.dim)
    query, key, value = (
        Buffer(name, n * heads.dim) for name, n in (("q", heads.query), ("k", heads.kv), ("v", heads.kv))
    )
    products = tuple(MatMul(_INPUT, buffer, f"{buffer.name}.weight") for buffer in (query, key, value))
    attention = tuple(
        Attention(query, key, value, out, layer, heads.query, heads.kv, heads.dim, heads.dim**-0.5, kv_type)
        for layer in range(LAYERS)
    )
    return Program(1, 2, 3, _INPUT, out, products + attention)


def load(heads: Heads, kv_type: KvType, level: str, threads: int, context: int, rows: int) -> CpuStage:
    program, generator = program_of(heads, kv_type), np.random.default_rng(0)
    limits = StageLimits(max(rows, 512), 1, 1, context, -(-context // KV_BLOCK_TOKENS), kv_type)
    sources = []
    for step in program.steps:
        if isinstance(step, MatMul):
            shape = (step.out.width, _INPUT.width)
            data = partial(random_matrix, generator, QuantType.Q8_0, shape)
            sources.append(TensorSource(step.weight, QuantType.Q8_0, shape, data))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "weights.gguf"
        write_gguf(path, {}, sources)
        return CpuBackend(threads, level).load(program, dict(open_model(path).tensors), limits, lambda done: None)


def run(stage: CpuStage, start: int, rows: int, first_block: int = 0) -> float:
    """Seconds for `rows` rows at positions from `start` on, whose blocks follow each other."""
    positions = np.arange(start, start + rows, dtype=np.int32)
    table = np.arange(first_block, first_block - (-(start + rows) // KV_BLOCK_TOKENS), dtype=np.int32)
    starts = np.array([0, rows], np.int32)
    batch = Batch(
        np.zeros(rows, np.int32), positions, starts, np.array([0, len(table)], np.int32), table, positions[:0]
    )
    hidden = np.random.default_rng(first_block).standard_normal((rows, _INPUT.width), np.float32)
    started = perf_counter()
    stage.run(batch, hidden)
    return perf_counter() - started


def fill(stage: CpuStage, block: int, rows: int) -> None:
    """Keys and values for the blocks from `block` on, as of a sequence that begins there: quicker than a long one."""
    run(stage, 0, rows, block)


def measure(stage: CpuStage, heads: Heads, setup: Setup, probe: ReadProbe, rounds: int) -> Row:
    def limits() -> tuple[float, float]:
        return probe.measure(_READ_S), probes.fma_peak(setup.threads, _PEAK_S)

    before, times, reads, peaks = limits(), [], [], []
    for _ in range(rounds):
        seconds = min(run(stage, setup.depth, setup.rows) for _ in range(10 if setup.rows < 16 else 1))
        after = limits()
        times.append(seconds)
        reads.append(Pair(setup.read_bytes(heads) / seconds / 1e9, before[0], after[0]))
        peaks.append(Pair(setup.products(heads) / seconds / 1e9, before[1], after[1]))
        before = after
    return Row(
        kv_type=setup.kv_type,
        level=setup.level,
        threads=setup.threads,
        depth=setup.depth,
        rows=setup.rows,
        ms=median(times) * 1e3,
        gb_s=median(pair.speed for pair in reads),
        gmac_s=median(pair.speed for pair in peaks),
        read_share=Spread.of(pair.share for pair in reads),
        peak_share=Spread.of(pair.share for pair in peaks),
    )


def measure_all(options: argparse.Namespace) -> Iterator[Row]:
    heads, most = options.heads, max(options.rows)
    probe = ReadProbe(options.threads)
    for kv_type in options.kv:
        for level in options.levels:
            context = max(options.depths) + most
            with closing(load(heads, kv_type, level, options.threads, context, most)) as stage:
                for start in range(0, context, 512):
                    fill(stage, start // KV_BLOCK_TOKENS, min(512, context - start))
                for depth in options.depths:
                    for rows in options.rows:
                        setup = Setup(kv_type, level, options.threads, depth, rows)
                        yield measure(stage, heads, setup, probe, options.rounds)


def parse(arguments: list[str]) -> argparse.Namespace:
    levels = _native.available_levels()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kv", default="f16,q8_0", help="KV types, separated by commas")
    parser.add_argument("--heads", default="32/4x64", help="query heads / KV heads x channels")
    parser.add_argument("--depths", default="8192", help="positions before, separated by commas")
    parser.add_argument("--rows", default="1,512", help="rows computed together, separated by commas")
    parser.add_argument("--levels", default=levels[-1], help=f"feature levels out of {', '.join(levels)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="turns of limits and kernels")
    parser.add_argument("--json", type=Path, help="also write the rows there, a JSON object a line")
    options = parser.parse_args(arguments)
    try:
        options.kv = [KvType(name) for name in options.kv.split(",")]
        options.heads = Heads(*map(int, options.heads.replace("x", "/").split("/")))
        options.depths = [int(text) for text in options.depths.split(",")]
        options.rows = [int(text) for text in options.rows.split(",")]
    except (TypeError, ValueError) as error:
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
