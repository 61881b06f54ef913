"""Checks that GPUs without warpgroup instructions for many rows (all but compute capability 9.0), whose quantized
activations have another layout, give the CPU's bits in products, experts and whole stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.kernels import _native
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.runtime.device import Launch
from llamaclust.kernels.cuda.runtime.sources import modules, whole_text
from llamaclust.model.quant_types import QuantType
from support.arithmetic.matmul_cases import TYPES, check_equal_bits, random_activations, random_weights
from support.cuda.launching import Bench
from support.cuda.product_cases import LEVEL, generator_of, load, none_numbers, products, segment_cols
from support.cuda.shim_device import ShimDevice
from support.cuda.stages import LIMITS, Open, random_tokens, run, same

GPUS = {"8.9": (8, 9), "12.0": (12, 0)}
"""Compute capabilities from 9.0 on copy weights differently, but only in kernels for few rows."""
STAGE_LIMITS = replace(LIMITS, max_batch_tokens=70, max_outputs=70)


class RecordingDevice(ShimDevice):
    """A shim that records the names of the kernels that it launched."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.launched: set[str] = set()

    def launch(self, launch: Launch) -> None:
        self.launched.add(launch.kernel)
        super().launch(launch)


@pytest.fixture(scope="module")
def of_layout() -> frozenset[str]:
    """Returns the modules that read or write quantized activations, and the module for float weights."""
    found = {name for name, path in modules().items() if '"activations.cuh"' in whole_text(path)}
    return frozenset({*found, "matmul.float"})


@pytest.fixture(scope="module", params=GPUS)
def device(
    request: pytest.FixtureRequest, build_shim: Callable[..., Path], of_layout: frozenset[str]
) -> Iterator[RecordingDevice]:
    """Overrides the `device` fixture of other tests."""
    gpu = GPUS[request.param]
    whole = modules()
    products_alone = {name: whole[name] for name in ("matmul.simple", "matmul.k", "elementwise.quantize")}
    define = (f"-DLLAMACLUST_ARCH={100 * gpu[0] + 10 * gpu[1]}",)
    library = build_shim(whole if gpu == (8, 9) else products_alone, define, defined=of_layout)
    made = RecordingDevice(library, compute_capability=gpu, shared_bytes=99 << 10)
    yield made
    made.close()


def kinds_of(device: ShimDevice) -> list[QuantType]:
    return [kind for kind in TYPES if any(name.endswith(f".gemm_{kind.name}") for name in device.kernels)]


def test_kernels_are_those_of_a_warp(device: RecordingDevice) -> None:
    assert len(kinds_of(device)) >= 15
    assert not [name for name in device.kernels if "gemm_wide" in name]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_products_have_the_bits_of_the_cpu(bench: Bench, device: RecordingDevice, kind: QuantType) -> None:
    """Covers one, several and many rows, in one block of rows and in several."""
    if kind not in kinds_of(device):
        pytest.skip("kernels are compiled for one such GPU, to save time")
    out_rows, cols = 33, 3 * segment_cols(kind)
    source = generator_of(kind, out_rows, cols)
    loaded = load(bench, kind, random_weights(source, kind, out_rows, cols), out_rows, cols)
    device.launched.clear()
    for rows in (1, 7, 40, 66, 129):
        x = random_activations(source, rows, cols)
        none_numbers(x, segment_cols(kind))
        expected = _native.matmul(LEVEL, loaded.on_cpu, x)
        check_equal_bits(products(bench, loaded.weights, x, sms=1), expected, kind, rows)
    names = {name.rpartition(".")[2] for name in device.launched if "matmul" in name}
    assert names == {f"gemv_{kind.name}", f"gemm_{kind.name}"}


@pytest.mark.parametrize("name", ["llama", "moe"])
def test_stages_have_the_bits_of_the_cpu(opened: Open, cpu: CpuBackend, device: RecordingDevice, name: str) -> None:
    """Covers a prompt whose experts have many lines each, and chunks of 8 tokens."""
    if device.compute_capability != (8, 9):
        pytest.skip("a stage is compiled for one such GPU, to save time")
    model, cuda = opened(name), CudaBackend("cuda:0", device, 1)
    tokens = random_tokens(model, 70)
    device.launched.clear()
    for chunk in (70, 8):
        wanted = run(cpu, model, tokens, chunk, STAGE_LIMITS)
        same(run(cuda, model, tokens, chunk, STAGE_LIMITS), wanted)
    assert {f"matmul.simple.{kernel}_Q8_0" for kernel in ("gemv", "gemm")} <= device.launched
