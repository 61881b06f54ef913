"""Tests of launches that overlap the preceding kernel: the driver calls, the GPUs that support them, and the waits of
kernels before they read results."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.cuda.executor.plan import Plan
from llamaclust.kernels.cuda.executor.shapes import Shape
from llamaclust.kernels.cuda.launches import matmul
from llamaclust.kernels.cuda.runtime import cupy_open
from llamaclust.kernels.cuda.runtime.cupy_device import CupyDevice
from llamaclust.kernels.cuda.runtime.device import Launch
from llamaclust.kernels.cuda.runtime.overlap import OverlappingLauncher, overlaps
from llamaclust.kernels.cuda.runtime.sources import INCLUDE, modules
from llamaclust.model.loader import Model
from support.cuda.fake_cupy import FakeCupy, FakeNvrtc, FakeRuntime
from support.cuda.shim_build import SHIM, compiler
from support.models.tiny_model import build_tiny_model

_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_CONFIG, _ATTRIBUTE = struct.Struct("@7I P P I"), struct.Struct("@i 4x i 60x")
"""CUlaunchConfig and CUlaunchAttribute of cuda.h."""
_SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


class DriverError(Exception):
    pass


@dataclass
class FakeDriver:
    """A fake driver library that records launches, with arguments read as `kinds`."""

    kinds: tuple[Any, ...] = ()
    status: int = 0
    launches: list[tuple[Any, ...]] = field(default_factory=list)
    attributes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cuLaunchKernelEx = _LAUNCH(self._launch)

    def _launch(self, config: int, function: int, args: int, extra: int | None) -> int:
        *sizes, shared_bytes, stream, attributes, count = _CONFIG.unpack(ctypes.string_at(config, _CONFIG.size))
        addresses = (ctypes.c_void_p * len(self.kinds)).from_address(args)
        values = [kind.from_address(at).value for kind, at in zip(self.kinds, addresses, strict=True)]
        given = ctypes.string_at(attributes, count * _ATTRIBUTE.size)
        self.attributes += _ATTRIBUTE.iter_unpack(given)
        self.launches.append((function, tuple(sizes[:3]), tuple(sizes[3:]), shared_bytes, stream, values, extra))
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()

    def load(name: str) -> FakeDriver:
        assert name == "libcuda.so.1"
        return made

    monkeypatch.setattr(ctypes, "CDLL", load)
    return made


def test_what_the_driver_is_given(driver: FakeDriver) -> None:
    driver.kinds = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_float, ctypes.c_double, ctypes.c_int32)
    args = (np.uint64(2**63 + 8), np.int32(-7), np.float32(0.375), np.float64(1e300), np.int32(9))
    launcher = OverlappingLauncher(DriverError)
    for number, (grid, block) in enumerate([((3, 65535, 1), (256, 1, 1)), ((2**31 - 1, 2, 7), (128, 8, 1))]):
        launcher.launch(2**40 + number, Launch("rows.merge", grid, block, args, 99 << 10), 2**41 + 5)
        values = [int(args[0]), -7, 0.375, 1e300, 9]
        assert driver.launches[-1] == (2**40 + number, grid, block, 99 << 10, 2**41 + 5, values, None)
    assert driver.attributes == [(_SERIALIZATION, 1)] * 2


@pytest.mark.parametrize("status", [1, 700])
def test_a_launch_that_the_driver_refuses(driver: FakeDriver, status: int) -> None:
    driver.status = status
    with pytest.raises(DriverError) as error:
        OverlappingLauncher(DriverError).launch(8, Launch("rows.merge", (1, 1, 1), (1, 1, 1), ()), 0)
    assert error.value.args == (status,)


@pytest.mark.parametrize("gpu", [(8, 0), (8, 9), (9, 0), (12, 0)], ids=str)
def test_gpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, tmp_path: Path, gpu: tuple[int, int]
) -> None:
    """Kernels that wait overlap from compute capability 9.0 on; all others are launched by CuPy."""
    cupy = FakeCupy(FakeRuntime(gpus=(gpu,)))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cupy_open, "open_nvrtc", FakeNvrtc)
    device = CupyDevice(folder=tmp_path)
    named = {"matmul.k.gemv_Q4_K": True, "matmul.k.gemm_Q4_K": False, "elementwise.norms.rms_norm_parts": False}
    for kernel in named:
        device.launch(Launch(kernel, (1, 1, 1), (1, 1, 1), (), 50 << 10))
    device.synchronize()
    by_function = {kernel.kernel.ptr: kernel for kernel in cupy.kernels}
    assert all(kernel.max_dynamic_shared_size_bytes == 50 << 10 for kernel in cupy.kernels)
    by_driver = [by_function[launch[0]].name for launch in driver.launches]
    assert by_driver == (["gemv_Q4_K"] if gpu >= (9, 0) else [])
    assert [launch[0] for launch in cupy.launches] == [
        name for kernel, waits in named.items() if (name := kernel.rpartition(".")[2]) not in by_driver or not waits
    ]
    assert all(launch[3] == 50 << 10 and launch[4] == cupy.runtime.stream.ptr for launch in driver.launches)


def test_launches_in_order_overlap_nothing(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, tmp_path: Path) -> None:
    cupy = FakeCupy(FakeRuntime(gpus=((9, 0),)))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cupy_open, "open_nvrtc", FakeNvrtc)
    device = CupyDevice(folder=tmp_path)
    device.launch(Launch("matmul.k.gemv_Q4_K", (1, 1, 1), (1, 1, 1), (), in_order=True))
    device.synchronize()
    assert len(cupy.launches) == 1 and driver.launches == []


@pytest.mark.parametrize("start", [0, 1], ids=["with tokens", "later layers"])
def test_plans_are_there_before_attention_waits(tmp_path: Path, start: int) -> None:
    """A launch without overlap separates the plan and the rotation from the overlapping launches."""
    build_tiny_model(tmp_path / "m.gguf", layers=3)
    model = Model.open(tmp_path / "m.gguf")
    program = model.program(start, 2)
    tensors = model.tensors_for(program)
    weights = {name: matmul.Weights(tensor.quant_type, tensor.shape) for name, tensor in tensors.items()}
    plan = Plan(program, weights, StageLimits(32, 32, 4, 512, 256))
    launches = [one for one in plan.launches(Shape(1, 1, decode=True)) if isinstance(one, Launch)]
    read_early = [i for i, one in enumerate(launches) if one.kernel.endswith((".plan", ".rotation"))]
    behind = launches[max(read_early) + 1 :]
    assert len(read_early) == 2 and any(overlaps(one.kernel) for one in behind)
    assert behind[0].in_order or not overlaps(behind[0].kernel)


# Checks of preprocessed sources.


@dataclass(frozen=True)
class Function:
    parameters: tuple[str, ...]
    body: str

    @property
    def pointers(self) -> dict[str, bool]:
        """Returns whether each pointer is `const __restrict__`, by name: such memory may be read before the wait."""
        return {one.split()[-1].lstrip("*"): "__restrict__" in one for one in self.parameters if "*" in one}


@cache
def preprocessed(module: str) -> str:
    includes = [f"-I{folder}" for folder in (*INCLUDE, SHIM)]
    options = ("-std=c++20", "-E", "-P", "-DLLAMACLUST_SHIM", f'-DLLAMACLUST_MODULE="{module}"', "-x", "c++")
    command = [compiler(), *options, *includes, str(modules()[module])]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def closing(text: str, at: int) -> int:
    """Returns the index of the bracket that closes the one at `at`."""
    depth = 0
    for index in range(at, len(text)):
        depth += (text[index] in "({") - (text[index] in ")}")
        if depth == 0:
            return index
    raise AssertionError(text[at : at + 80])


@cache
def names(module: str) -> frozenset[str]:
    return frozenset(re.findall(r"\bvoid (\w+)\(", preprocessed(module)))


@cache
def functions(module: str, name: str) -> tuple[Function, ...]:
    """Returns all overloads of a function."""
    return tuple(_functions(preprocessed(module), name))


def _functions(text: str, name: str) -> Iterator[Function]:
    for found in re.finditer(rf"\bvoid {name}\(", text):
        end = closing(text, found.end() - 1)
        if (begin := re.compile(r"\s*(?:const\s*)?(requires\s*\([^{]*\)\s*)?\{").match(text, end + 1)) is not None:
            body = text[begin.end() : closing(text, begin.end() - 1)]
            yield Function(tuple(one.strip() for one in text[found.end() : end].split(",")), body)


def kernels() -> Iterator[tuple[str, str]]:
    for module in modules():
        for name in re.findall(r"shim_registration_(\w+)\(", preprocessed(module)):
            yield module, name


WAIT = "wait_for_earlier_kernels();"
BEFORE_ALL = ("rows", "count")
"""Names of pointers to numbers of the microbatch, uploaded before all kernels."""
WEIGHTS = ("weight",)


@cache
def waiting(module: str, function: Function, depth: int = 3) -> Function | None:
    """Returns the function that waits: the given one or one that it calls."""
    if WAIT in function.body:
        return function
    called = names(module).intersection(re.findall(r"\b(\w+)(?:<[\w:, ]*>)?\(", function.body)) if depth else set()
    inner = (waiting(module, one, depth - 1) for name in sorted(called) for one in functions(module, name))
    return next((one for one in inner if one is not None), None)


def test_kernels_that_overlap_are_those_that_wait() -> None:
    found = list(kernels())
    named = {f"{module}.{name}" for module, name in found if overlaps(f"{module}.{name}")}
    waits = {
        f"{module}.{name}"
        for module, name in found
        if any(waiting(module, one) is not None for one in functions(module, name))
    }
    assert waits == named and len(named) >= 40
    assert {"matmul.grid.gemv_IQ2_S", "attention.few.few_q8_0_8", "attention.rows.merge"} <= named


def test_kernels_read_no_results_before_they_wait() -> None:
    for module, name in kernels():
        if not overlaps(f"{module}.{name}"):
            continue
        (kernel,) = functions(module, name)
        assert {at for at, is_restrict in kernel.pointers.items() if is_restrict} <= set(WEIGHTS), (module, name)
        function = waiting(module, kernel)
        assert function is not None
        before = function.body.partition(WAIT)[0]
        for pointer in {*kernel.pointers, *function.pointers} - {*BEFORE_ALL, *WEIGHTS}:
            read = re.search(rf"\*{pointer}\b|(?<![.\w]){pointer}\s*(\[|\+)", before)
            assert read is None, f"{module}.{name} reads {pointer} before it waits: {before}"


def test_attention_reads_plans_and_angles_before_it_waits() -> None:
    """Attention reads no queries, keys, values or results before it waits for the kernels that write them."""
    read = "".join(one.body for name in ("begin", "bring_near") for one in functions("attention.few", name))
    (bring,) = functions("attention.few", "bring")
    before = bring.body.partition(WAIT)[0] + read
    assert "angles[" in before and "step.tables[" in before
    assert re.findall(r"step\.(?:q|out|partials)\b|(?<![.\w])(?:k|v|from)\s*(?:\[|\+)", before) == []
    assert "step.q +" in bring.body and " k[" in bring.body
