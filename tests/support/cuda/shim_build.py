"""Compiles the GPU kernels for the CPU: one object file per source, cached by a hash of its inputs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from llamaclust.kernels.cuda.runtime.sources import INCLUDE, modules, whole_text
from support.paths import ROOT, TESTS

SHIM = TESTS / "kernels" / "cuda" / "shim"
BUILT = ROOT / "build" / "cuda-shim"
COMPILE_DEADLINE_S = 600.0

_INCLUDE = (*INCLUDE, SHIM)
# -O1 compiles in two thirds of the time of -O2, and the kernels are no slower in measurements.
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-sign-compare")
# Kernels may alias memory of different types; accesses beyond an array or without alignment end the launch.
_KERNEL_FLAGS = (
    "-fno-strict-aliasing",
    "-fsanitize=alignment,bounds",
    "-fsanitize-undefined-trap-on-error",
    "-Wno-unknown-pragmas",
    "-DLLAMACLUST_SHIM",
)


def compiler() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or "c++"


def build(
    kernels: Mapping[str, Path] | None = None,
    defines: tuple[str, ...] = (),
    shim_defines: tuple[str, ...] = (),
    defined: Collection[str] | None = None,
) -> Path:
    """Builds a library of the given modules, by default all; `defines` apply to the modules `defined`, by default all.
    Raises AssertionError with the compiler's message."""
    sources = modules() if kernels is None else kernels
    jobs = [
        (
            path,
            (*_KERNEL_FLAGS, f'-DLLAMACLUST_MODULE="{name}"', *(defines if defined is None or name in defined else ())),
        )
        for name, path in sources.items()
    ]
    jobs += [(path, ("-O3", *shim_defines)) for path in sorted(SHIM.glob("*.cpp"))]
    objects = [_object(*job) for job in jobs]
    library = BUILT / f"shim-{_hash(*(path.name for path in objects))}.so"
    if library.is_file():  # No lock: a starting worker must not wait while other libraries are compiled.
        return library
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / "lock").open("w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # so that processes do not compile the same sources at once
        list(pool.map(lambda made, job: _compile(made, *job), objects, jobs))
        if not library.is_file():
            _run(library, "-shared", *map(str, objects))
    return library


@cache
def _processor_flags() -> tuple[str, ...]:
    """Returns options for the FMA, F16C and AVX2 instructions that an x86 processor has."""
    if platform.machine() != "x86_64":
        return ()
    known = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    return tuple(f"-m{one}" for one in ("fma", "f16c", "avx2") if one in known)


def _object(path: Path, flags: tuple[str, ...]) -> Path:
    flags = (*_FLAGS, *flags, *_processor_flags())
    return BUILT / f"{path.stem}-{_hash(whole_text(path, _INCLUDE), *flags, compiler())}.o"


def _compile(made: Path, path: Path, flags: tuple[str, ...]) -> None:
    if not made.is_file():
        includes = [f"-I{folder}" for folder in _INCLUDE]
        _run(made, *_FLAGS, *flags, *_processor_flags(), *includes, "-x", "c++", "-c", str(path))


def _run(made: Path, *arguments: str) -> None:
    """Runs the compiler; `made` appears only once it is complete."""
    partial = made.with_suffix(f".part{made.suffix}")
    done = subprocess.run(
        [compiler(), *arguments, "-o", str(partial)],
        capture_output=True,
        text=True,
        timeout=COMPILE_DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    partial.rename(made)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    print(f"GPU kernels for the CPU: {build()}")
