"""Matrix products with sums over k in blocks, beside the product's own, in C++ (`sums.cpp`); the tree of such sums."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from statistics import median

import numpy as np
from links import compiler
from numpy.typing import NDArray

from llamaclust.core.errors import UsageError
from llamaclust.kernels import _native
from llamaclust.model.quant_types import QuantType

TYPES = (QuantType.Q4_K, QuantType.Q6_K, QuantType.Q4_0, QuantType.Q8_0, QuantType.F16)
MOST_TOKENS = 512
BLOCK_UNIT = 256  # columns

_FOLDER = Path(__file__).parent
_NATIVE = _FOLDER.parents[1] / "src" / "llamaclust" / "kernels" / "cpu" / "native"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
_LEVEL_FLAGS = {
    "generic": (),
    "avx2": _AVX2,
    "avxvnni": (*_AVX2, "-mavxvnni"),
    "avx512": _AVX512,
    "avx512vnni": (*_AVX512, "-mavx512vnni"),
    "avx512vbmi": (*_AVX512, "-mavx512vnni", "-mavx512vbmi"),
}
_FLAGS = ("-std=c++20", "-ffp-contract=off", "-fno-rtti", "-shared", "-fPIC", f"-I{_NATIVE}")


class Way(IntEnum):
    """Sums over k: one chain; blocks that a tree joins; one chain, of all rows the first half before the second."""

    CHAIN = 0
    BLOCKS = 1
    TWO_PASSES = 2


def build(folder: Path, optimization: str = "-O3") -> Path:
    """The library for this processor; UsageError where it cannot be built. Tests need no fast code."""
    level, command = _native.available_levels()[-1], compiler()
    if command is None or level not in _LEVEL_FLAGS:
        raise UsageError(f"no C++ compiler found, or none of {', '.join(_LEVEL_FLAGS)} is this CPU's level: {level}")
    library, source = folder / "sums.so", _FOLDER / "sums.cpp"
    arguments = [command, optimization, *_FLAGS, *_LEVEL_FLAGS[level], str(source), "-o", str(library)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UsageError(f"{source}: {done.stderr.strip()}")
    return library


def block_borders(columns: int, blocks: int) -> tuple[int, ...]:
    """The borders of blocks of k: whole 256s, nearly equal, which follow from the number of columns alone."""
    units = -(-columns // BLOCK_UNIT)
    return tuple(min(columns, BLOCK_UNIT * (units * block // blocks)) for block in range(blocks + 1))


def subtrees(begin: int, end: int) -> list[range]:
    """The fewest aligned subtrees that blocks [begin, end) consist of: a member sends a sum for each of them."""
    found = []
    while begin < end:
        size = begin & -begin or 1 << (end.bit_length() - 1)
        while begin + size > end:
            size //= 2
        found.append(range(begin, begin + size))
        begin += size
    return found


def tree_sum(sums: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The sum of a power of two of blocks: of two halves each time."""
    if len(sums) == 1:
        return sums[0]
    half = len(sums) // 2
    total: NDArray[np.float32] = tree_sum(sums[:half]) + tree_sum(sums[half:])
    return total


def joined(parts: dict[range, NDArray[np.float32]], whole: range) -> NDArray[np.float32]:
    """The tree's sum from sums of aligned subtrees, which may differ in size."""
    if whole in parts:
        return parts[whole]
    middle = (whole.start + whole.stop) // 2
    total: NDArray[np.float32] = joined(parts, range(whole.start, middle)) + joined(parts, range(middle, whole.stop))
    return total


class Products:
    """Products with some copies of a matrix of random weights, on this thread."""

    def __init__(self, library: Path, quant_type: QuantType, rows: int, columns: int, copies: int = 1) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.sums_open.restype = ctypes.c_void_p
        self._library.sums_run.restype = ctypes.c_double
        self._library.sums_output.restype = ctypes.POINTER(ctypes.c_float)
        self._task = ctypes.c_void_p(self._library.sums_open(int(quant_type), rows, columns, copies))
        self._rows, self._copies = rows, copies
        self.bytes = rows * quant_type.info.row_bytes(columns)
        self.set_activations(np.random.default_rng(0).standard_normal((MOST_TOKENS, columns)).astype(np.float32))

    def close(self) -> None:
        self._library.sums_close(self._task)

    def set_activations(self, x: NDArray[np.float32]) -> None:
        """x[tokens, columns]."""
        x = np.ascontiguousarray(x)
        self._library.sums_set_activations(self._task, ctypes.c_void_p(x.ctypes.data), len(x))

    def seconds(self, way: Way, blocks: int, tokens: int, *, near: bool = False) -> float:
        """Processor time of a product, the mean of all copies."""
        run = self._library.sums_run(self._task, int(way), blocks, tokens, int(near), self._copies)
        return float(run) / self._copies

    def output(self, tokens: int) -> NDArray[np.float32]:
        """[tokens, rows] of the last product."""
        found = np.ctypeslib.as_array(self._library.sums_output(self._task), (tokens, self._rows))
        return found.copy()

    def prefers_near(self) -> bool:
        """True if one row is multiplied faster with weights prefetched from near."""
        pairs = [[self.seconds(Way.CHAIN, 1, 1, near=near) for near in (False, True)] for _ in range(3)]
        return median(near / far for far, near in pairs) < 0.97

    def ratios(self, tokens: int, ways: Sequence[tuple[Way, int]], turns: int, *, near: bool) -> list[float]:
        """Times relative to one chain, medians of pairs in turns; the first figure is the chain's seconds."""
        chain, others = [], [[] for _ in ways]  # type: list[float], list[list[float]]
        for turn in range(turns + 1):
            order = range(len(ways)) if turn % 2 else reversed(range(len(ways)))
            chain.append(self.seconds(Way.CHAIN, 1, tokens, near=near))
            for i in order:
                others[i].append(self.seconds(*ways[i], tokens, near=near))
        pairs = [[b / a for a, b in zip(chain[1:], times[1:], strict=True)] for times in others]
        return [median(chain[1:]), *map(median, pairs)]
