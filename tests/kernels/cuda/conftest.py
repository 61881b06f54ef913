"""Fixtures of GPU tests: the device, which is the shim or with --gpu a real GPU, and models and backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llamaclust.cluster.config.environment import environment
from llamaclust.core.errors import UsageError
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.runtime.device import Device
from llamaclust.model.loader import Model
from support.cuda.gpu_run import GpuRun, RecordingGpu
from support.cuda.launching import Bench
from support.cuda.shim_build import build
from support.cuda.shim_device import ShimDevice
from support.cuda.stages import QUANTIZED, SMALL, Free, Open
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="test on a real card")
    parser.addoption("--results", type=Path, metavar="FILE", help="append results to FILE, and start with its failures")
    parser.addoption("--sources", default="", help="with --results, do not repeat what passed with the same SOURCES")
    parser.addoption("--all-architectures", action="store_true", help="compile for every kind of card")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu", default=False):
        config.pluginmanager.register(GpuRun.of(config), "gpu-run")


@pytest.fixture(scope="session")
def build_shim(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Returns the function that compiles kernels for the CPU. Skips its tests on a real GPU."""
    if request.config.getoption("--gpu", default=False):
        pytest.skip("kernels are compiled for the shim")
    return build


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.config.getoption("--gpu", default=False):
        run = request.config.pluginmanager.get_plugin("gpu-run")
        assert isinstance(run, GpuRun)
        try:
            made: Device = RecordingGpu(environment().kernels_dir, run.launched)
        except UsageError as error:
            pytest.exit(str(error), returncode=2)
        run.device = made
    else:
        made = ShimDevice(build())
    yield made
    made.close()


@pytest.fixture
def bench(device: Device) -> Iterator[Bench]:
    with Bench(device) as one:
        yield one


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    folder, models = tmp_path_factory.mktemp("cuda"), dict[str, Model]()

    def open_once(name: str) -> Model:
        path = folder / f"{name}.gguf"
        if name not in models:
            if name in QUANTIZED:
                build_tiny_model(path, **SMALL, **QUANTIZED[name])
            else:
                build_architecture(path, name)
            models[name] = Model.open(path)
        return models[name]

    return open_once


@pytest.fixture(scope="module")
def cpu() -> CpuBackend:
    return CpuBackend(1)


@pytest.fixture
def cuda(device: Device) -> Iterator[CudaBackend]:
    before = Free.of(device)
    yield CudaBackend("cuda:0", device, 1)
    assert before.taken == 0, "memory was not given back"
