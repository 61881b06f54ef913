"""Fixtures of GPU tests: the device, which is the shim or with --gpu a real GPU, and models and backends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llamaclust.cluster.config.environment import environment
from llamaclust.core.errors import UsageError
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.runtime.cupy_device import CupyDevice
from llamaclust.kernels.cuda.runtime.device import Device
from llamaclust.model.loader import Model
from support.cuda.gpu_run import GpuRun
from support.cuda.launching import Bench
from support.cuda.shim_build import build
from support.cuda.shim_device import ShimDevice
from support.cuda.stages import QUANTIZED, SMALL, Free, Open
from support.models.tiny_architectures import build_architecture
from support.models.tiny_model import build_tiny_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="test on a real card")
    parser.addoption("--all-architectures", action="store_true", help="compile for every kind of card")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu", default=False):
        config.pluginmanager.register(GpuRun(), "gpu-run")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.config.getoption("--gpu", default=False):
        try:
            made: Device = CupyDevice(0, folder=environment().kernels_dir)
        except UsageError as error:
            pytest.exit(str(error), returncode=2)
        run = request.config.pluginmanager.get_plugin("gpu-run")
        assert isinstance(run, GpuRun)
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
