"""The device that kernels are tested on: none, or with --gpu the card that is there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from launching import Bench
from shim_build import build
from shim_device import ShimDevice

from llamaclust.cluster.config import environment
from llamaclust.errors import UsageError
from llamaclust.kernels.cuda.cupy_device import CupyDevice
from llamaclust.kernels.cuda.device import Device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="test on a real card")
    parser.addoption("--all-architectures", action="store_true", help="compile for every kind of card")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.config.getoption("--gpu", default=False):
        try:
            made: Device = CupyDevice(0, folder=environment().kernels_dir)
        except UsageError as error:
            pytest.exit(str(error), returncode=2)
    else:
        made = ShimDevice(build())
    yield made
    made.close()


@pytest.fixture
def bench(device: Device) -> Iterator[Bench]:
    with Bench(device) as one:
        yield one
