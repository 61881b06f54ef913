"""Fixtures that several areas share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llamaclust.errors import UsageError

os.environ.setdefault("LLAMACLUST_CACHE_SIZE", "0")  # a user's prepared layers are not for models that tests make up
os.environ.setdefault("LLAMACLUST_WEIGHTS_SIZE", "0")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct Q4_1, where `make test` puts it; tests that need it skip without it."""
    from llamaclust.tools.catalog import resolve_model

    try:
        return resolve_model("smollm2-135m-instruct")
    except UsageError as error:
        pytest.skip(f"the demo model is missing ({error})")


_CLUSTERS = ("bad_input", "cli", "cluster", "invariance_demo", "launcher", "recovery", "trust", "weights", "worker")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_").startswith(_CLUSTERS) or item.path.parent.name == "network":
            item.add_marker("clusters")
        if item.path.stem == "test_launcher_ray":
            item.add_marker("alone")
