"""Checks that every module compiles for all supported GPUs, into single IEEE operations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from llamaclust.kernels.cuda.runtime.device import MIN_COMPUTE_CAPABILITY
from llamaclust.kernels.cuda.runtime.sources import OPTIONS, modules, whole_text
from support.cuda.compilers import NONE, ByNvcc, ByNvrtc, find_compiler, find_nvrtc

Compiler = ByNvrtc | ByNvcc
OLDEST = 10 * MIN_COMPUTE_CAPABILITY[0] + MIN_COMPUTE_CAPABILITY[1]
OLDEST_OF_CUDA_13 = 75


def known_to(compiler: Compiler) -> list[int]:
    """Returns the compiler's architectures that kernels support, in ascending order."""
    return [one for one in compiler.architectures if one >= OLDEST]


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    found = find_compiler()
    if found is None:
        pytest.skip(NONE)
    yield found


@pytest.mark.parametrize("name", modules())
def test_a_module_for_every_architecture(name: str, compiler: Compiler, request: pytest.FixtureRequest) -> None:
    """Compiles machine code for the oldest GPUs, which have the least shared memory, and PTX for the newest, with fewer
    optimizations if these save time; or machine code for all GPUs, as users get it (--all-architectures)."""
    known, text = known_to(compiler), whole_text(modules()[name])
    assert known[0] <= OLDEST_OF_CUDA_13, "the oldest cards are not compiled for any more"
    every = request.config.getoption("--all-architectures", default=False)
    machine = OPTIONS if every else (*OPTIONS, *compiler.quick_binary)
    with ThreadPoolExecutor(2) as pool:
        for binary in pool.map(lambda one: compiler.binary(name, text, one, machine), known if every else known[:1]):
            assert binary.startswith(b"\x7fELF")
    assert f".target sm_{known[-1]}" in compiler.ptx(name, text, known[-1], (*OPTIONS, *compiler.quick))


def test_every_module_for_gpus_that_only_cuda_12_compiles_for(request: pytest.FixtureRequest) -> None:
    """Compiles machine code for the oldest GPUs, or for all with --all-architectures."""
    compiler = find_nvrtc(12)
    if compiler is None:
        pytest.skip("no NVRTC of CUDA 12 (make cuda-matrix installs it)")
    old = [one for one in known_to(compiler) if one < OLDEST_OF_CUDA_13]
    assert old[0] == OLDEST, "the oldest cards are not compiled for any more"
    texts = {name: whole_text(path) for name, path in modules().items()}
    every = request.config.getoption("--all-architectures", default=False)
    jobs = [(name, text, one) for name, text in texts.items() for one in (old if every else old[:1])]
    with ThreadPoolExecutor(2) as pool:
        for binary in pool.map(lambda job: compiler.binary(*job), jobs):
            assert binary.startswith(b"\x7fELF")
    ptx = compiler.ptx("matmul.simple", texts["matmul.simple"], OLDEST)
    assert "dp4a.s32.s32" in ptx and "mma.sync" not in ptx


def test_floats_are_single_ieee_operations(compiler: Compiler) -> None:
    """Subnormals are kept, no operation is approximate, and no multiplication is contracted with an addition."""
    operations: set[str] = set()
    for name in ("elementwise.rows", "elementwise.norms", "elementwise.rope"):
        operations |= set(
            re.findall(
                r"\b\w+\.[\w.]*f(?:32|64)\b", compiler.ptx(name, whole_text(modules()[name]), known_to(compiler)[0])
            )
        )
    assert {"fma.rn.f32", "div.rn.f32", "sqrt.rn.f32", "mul.rn.f64", "fma.rn.f64"} <= operations
    assert [one for one in operations if "ftz" in one or "approx" in one or "mad" in one] == []


def test_named_barriers_have_constant_numbers(compiler: Compiler) -> None:
    """A block takes all sixteen barriers if a number is in a register. Newer GPUs do not use named barriers."""
    newest = max(one for one in known_to(compiler) if one < 90)
    ptx = compiler.ptx("matmul.k", whole_text(modules()["matmul.k"]), newest, (*OPTIONS, *compiler.quick))
    barriers = re.findall(r"barrier\.(?:sync|arrive)\.aligned\s+([^;]+);", ptx)
    assert set(barriers) == {f"{number}, 64" for number in range(4)}


@pytest.mark.parametrize("contract", [True, False])
def test_the_options_matter(compiler: Compiler, contract: bool) -> None:
    """The options prevent contraction of plain C++; without them, the compiler contracts it."""
    text = 'extern "C" __global__ void f(float* x) { x[0] = x[1] * x[2] + x[3]; }\n'
    ptx = compiler.ptx("plain", text, known_to(compiler)[0], ("--std=c++20",) if contract else OPTIONS)
    assert ("fma.rn" in ptx) == contract
    assert ("add" in re.findall(r"\b(\w+)\.[\w.]*f32 ", ptx)) != contract
