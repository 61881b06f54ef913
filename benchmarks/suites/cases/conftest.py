from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def api() -> str:
    return os.environ["SUITE_API"]


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["SUITE_MODEL"]


@pytest.fixture(scope="session")
def checkout() -> Path:
    """Returns the checkout with a suite's tests, for suites whose tests are in no package."""
    return Path(os.environ["SUITE_CHECKOUT"])
