from __future__ import annotations

import asyncio
import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from runner.case import Case, Group, Measures, argument, option
from runner.options import existing, listed, positive

from llamaclust.cluster.config.catalog import resolve_model
from llamaclust.core.errors import LlamaclustError
from llamaclust.kernels.cpu.quantize import QUANTIZED_TYPES, quantize
from llamaclust.kernels.reference.dequantize import dequantize
from llamaclust.model.gguf.model_file import open_model
from llamaclust.model.quant_types import QuantType
from llamaclust.tools.quantize.mixes import FLOATS, NEEDS_IMPORTANCE

Float32 = NDArray[np.float32]
WIDTH = 2304
Quantize = Callable[[QuantType, Float32, Float32 | None], NDArray[np.uint8]]


class Ggml:
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
    """Returns weights [rows, WIDTH], with about equally many rows from each of about 28 matrices of the model."""
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


@dataclass(frozen=True)
class QuantizeCase(Case):
    """Compares quantizers with llama.cpp's: error and time of every type on a model's own weights.
    Errors are root mean squares over rows of 2304 weights. For types with `+`, errors are weighted by a random
    importance. Both programs get the same rows and run in one thread. With --llama-quantize, the quantization of a
    whole file is timed too, in --threads threads."""

    rounds = 2
    model: str = argument("catalog name or path of a .gguf", str)
    ggml: Path | None = option(None, "path of libggml-base.so from a build of llama.cpp", existing)
    llama_quantize: Path | None = option(None, "path of llama.cpp's program llama-quantize", existing)
    mix: str = option("Q4_K_M", "quantization mix for the whole file")
    rows: int = option(448, "number of rows of weights per type", positive)
    types: tuple[str, ...] = option((), "types of weights (default: all)", listed(str))
    threads: int = option(2, "number of threads for the whole file", positive)

    async def groups(self) -> AsyncIterator[Group]:
        path = resolve_model(self.model)
        if self.ggml is not None:
            ggml, x = Ggml(self.ggml), rows_of(path, self.rows)
            importance = np.exp(1.2 * np.random.default_rng(1).standard_normal(WIDTH)).astype(np.float32)
            importance /= importance.mean()
            for kind in QUANTIZED_TYPES:
                for weights in (None, importance):
                    is_wanted = kind not in FLOATS and (not self.types or kind.name in self.types)
                    if is_wanted and (weights is not None or kind not in NEEDS_IMPORTANCE):
                        makers: dict[str, Quantize] = {"ggml": ggml.quantize, "llamaclust": quantize}
                        ways = {name: partial(self._measure, make, kind, x, weights) for name, make in makers.items()}
                        yield Group(kind.name + "+" * (weights is not None), ways)
        if self.llama_quantize is not None:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                out, count = str(Path(folder, "out.gguf")), str(self.threads)
                ours = (sys.executable, "-m", "llamaclust", "model", "quantize", str(path), out, self.mix, "-t", count)
                commands = {
                    "llama.cpp": (str(self.llama_quantize), str(path), out, self.mix, count),
                    "llamaclust": ours,
                }
                yield Group(self.mix, {name: partial(self._file, words) for name, words in commands.items()})

    async def _measure(
        self, make: Quantize, kind: QuantType, x: Float32, importance: Float32 | None, turn: int
    ) -> Measures:
        make(kind, x[:1], importance)  # The first call also makes tables.
        begun_s = time.perf_counter()
        data = make(kind, x, importance)
        seconds = time.perf_counter() - begun_s
        miss = dequantize(kind, data.tobytes(), x.size).reshape(x.shape) - x
        w = np.float32(1) if importance is None else importance
        error = np.sqrt((w * miss**2).sum(dtype=np.float64) / (w * x**2).sum(dtype=np.float64))
        return {"error": float(error), "ns a weight": 1e9 * seconds / x.size}

    async def _file(self, words: tuple[str, ...], turn: int) -> Measures:
        begun_s = time.perf_counter()
        done = await asyncio.to_thread(subprocess.run, words, capture_output=True, check=False)
        if done.returncode:
            raise LlamaclustError(f"{words[0]} failed: {done.stderr.decode(errors='replace')[-300:]}")
        return {"s": time.perf_counter() - begun_s}
