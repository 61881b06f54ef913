"""The server under test."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def api() -> str:
    return os.environ["SUITE_API"]


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["SUITE_MODEL"]
