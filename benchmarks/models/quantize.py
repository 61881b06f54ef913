"""Quantizers beside llama.cpp's: error and time of every type on a model's own weights, in rows of 2304; with
--llama-quantize also the time of a whole file.

    python benchmarks/models/quantize.py smollm2-135m-instruct --ggml BUILD/bin/libggml-base.so
    python benchmarks/models/quantize.py 1.1b-f16.gguf --llama-quantize BUILD/bin/llama-quantize --mix Q4_K_M

Errors are roots of mean squares, weighted by a random importance where one is given (+). Both sides get the same
float32 rows and run in one thread; of a whole file, in all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.kernels.cpu.quantize import QUANTIZED_TYPES, quantize
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.quantize.mixes import FLOATS, NEEDS_IMPORTANCE

Float32 = NDArray[np.float32]
WIDTH = 2304


class Ggml:
    """ggml's quantizers, out of a shared library."""

    class _Memory(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._library.ggml_init.argtypes = [self._Memory]
        self._library.ggml_init(self._Memory(1 << 20, None, False))
        self._library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]

    def quantize(self, kind: QuantType, x: Float32, importance: Float32 | None) -> NDArray[np.uint8]:
        out = np.zeros((len(x), kind.info.row_bytes(x.shape[1])), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        self._library.ggml_quantize_chunk(int(kind), x.ctypes.data, out.ctypes.data, 0, len(x), x.shape[1], weights)
        return out


def rows_of(path: Path, most: int) -> Float32:
    """Rows of WIDTH out of the matrices of every fourth layer, as many of each."""
    model = open_model(path)
    tensors = [tensor for tensor in model.tensors.values() if len(tensor.shape) > 1 and tensor.layer is not None]
    chosen = tensors[:: max(1, len(tensors) // 28)]
    share = max(1, most // len(chosen))
    parts = []
    for tensor in chosen:
        count = tensor.rows * tensor.shape[-1]
        flat = dequantize(tensor.quant_type, tensor.read(), count)
        parts.append(flat[: count // WIDTH * WIDTH].reshape(-1, WIDTH)[:share])
    return np.ascontiguousarray(np.concatenate(parts))


def compare_types(path: Path, library: Path, most: int, names: list[str]) -> None:
    ggml, x = Ggml(library), rows_of(path, most)
    importance = np.exp(1.2 * np.random.default_rng(1).standard_normal(WIDTH)).astype(np.float32)
    importance /= importance.mean()
    print(f"{len(x)} rows of {WIDTH}\ntype      error: ours   theirs   ratio   ns a weight: ours   theirs   ratio")
    for kind in QUANTIZED_TYPES:
        if kind in FLOATS or (names and kind.name not in names):
            continue
        for has in (False, True):
            if has or kind not in NEEDS_IMPORTANCE:
                _compare(ggml, kind, x, importance if has else None)


def _compare(ggml: Ggml, kind: QuantType, x: Float32, importance: Float32 | None) -> None:
    figures = []
    for make in (quantize, ggml.quantize):
        make(kind, x[:1], importance)  # tables are made on first use
        start = time.perf_counter()
        data = make(kind, x, importance)
        seconds = time.perf_counter() - start
        miss = dequantize(kind, data.tobytes(), x.size).reshape(x.shape) - x
        w = np.float32(1) if importance is None else importance
        error = np.sqrt((w * miss**2).sum(dtype=np.float64) / (w * x**2).sum(dtype=np.float64))
        figures.append((error, 1e9 * seconds / x.size))
    (ours, our_ns), (theirs, their_ns) = figures
    name = kind.name + "+" * (importance is not None)
    ratio = f"{ours / theirs:7.3f}" if theirs > 1e-6 else "      -"
    print(f"{name:9} {ours:11.5f} {theirs:8.5f} {ratio} {our_ns:19.1f} {their_ns:8.1f} {our_ns / their_ns:7.2f}")


def compare_files(path: Path, program: Path, mix: str, threads: int) -> None:
    """Seconds of the two commands, in turns, twice each: the better one counts."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        out = str(Path(folder, "out.gguf"))
        ours = [sys.executable, "-m", "llamaclust", "model", "quantize", str(path), out, mix, "-t", str(threads)]
        theirs = [str(program), str(path), out, mix, str(threads)]
        seconds = [[_seconds(command) for command in (ours, theirs)] for _ in range(2)]
    our_s, their_s = (min(run[side] for run in seconds) for side in range(2))
    print(f"{mix} of {path.name}: {our_s:.1f} s, theirs {their_s:.1f} s, ratio {our_s / their_s:.2f}")


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ggml", type=Path, metavar="LIBRARY", help="libggml-base.so of a build of llama.cpp")
    parser.add_argument("--llama-quantize", type=Path, metavar="PROGRAM")
    parser.add_argument("--mix", default="Q4_K_M")
    parser.add_argument("--rows", type=int, default=448)
    parser.add_argument("--types", nargs="*", default=[], metavar="TYPE")
    parser.add_argument("--threads", "-t", type=int, default=2)
    given = parser.parse_args()
    path = resolve_model(given.model)
    if given.ggml:
        compare_types(path, given.ggml, given.rows, given.types)
    if given.llama_quantize:
        compare_files(path, given.llama_quantize, given.mix, given.threads)


if __name__ == "__main__":
    main()
