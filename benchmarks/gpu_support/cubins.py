"""Compiles the CUDA kernels on a machine without a GPU, with an NVRTC that need not be installed.

    python benchmarks/gpu_support/cubins.py FOLDER_OF_NVRTC 90 OUT --keep KEPT

OUT gets all modules, with the file names of llamaclust's kernel cache. KEPT keeps modules for later calls."""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.core.errors import UsageError
from llamaclust.kernels.cuda.runtime.cubin_cache import CubinCache
from llamaclust.kernels.cuda.runtime.nvrtc import Nvrtc
from llamaclust.kernels.cuda.runtime.sources import modules, whole_text


def open_nvrtc_in(folder: Path) -> Nvrtc:
    found = next(folder.glob("libnvrtc.so.*"), None)
    if found is None:
        raise UsageError(f"{folder} contains no libnvrtc.so.*; give the folder of NVRTC")
    for path in folder.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(path))  # NVRTC loads this library by name, so it must be loaded before.
    return Nvrtc(str(found))


def compile_all(nvrtc: Nvrtc, architecture: int, kept: Path, out: Path | None = None) -> None:
    """Compiles the modules that `kept` lacks, and copies all to `out`."""
    cache = CubinCache(kept)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)

    def compile_one(name: str) -> str:
        started = time.perf_counter()
        file = cache.get(nvrtc, name, whole_text(modules()[name]), architecture)
        if out is not None:
            shutil.copy(file, out)
        return f"{name}: {time.perf_counter() - started:.1f} s, {file.stat().st_size} bytes"

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for line in pool.map(compile_one, modules()):
            print(line, flush=True)
    cache.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nvrtc", type=Path, help="folder of libnvrtc.so.*")
    parser.add_argument("architecture", type=int, help="compute capability without a dot, such as 90")
    parser.add_argument("out", type=Path)
    parser.add_argument("--keep", type=Path, required=True, help="folder that keeps compiled modules for later calls")
    given = parser.parse_args()
    compile_all(open_nvrtc_in(given.nvrtc), given.architecture, given.keep, given.out)


if __name__ == "__main__":
    with ends_in_one_line():
        main()
