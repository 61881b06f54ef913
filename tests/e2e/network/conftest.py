"""Fixtures for emulated networks. Tests are skipped on machines that do not support them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llamaclust.model.quant_types import QuantType
from support.models.tiny_model import build_tiny_model
from support.network.box import Box, missing
from support.network.distant_cluster import TOKENS, Answer, eight, undisturbed


@pytest.fixture(scope="session", autouse=True)
def _box_works() -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds a model of six layers for tests with faults. `test_same_tokens` uses the demo model."""
    return build_tiny_model(tmp_path_factory.mktemp("network") / "tiny.gguf", quant_type=QuantType.Q8_0)


@pytest.fixture(scope="session")
def small_answers(small_model: Path) -> list[Answer]:
    """Returns one worker's answers to `eight(TOKENS)`."""
    return undisturbed(small_model, eight(TOKENS))


@pytest.fixture(params=[False, True], ids=["bridge", "delays"])
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    """Yields hosts a and b, on each kind of switch."""
    with Box(["a", "b"], delays=request.param) as two:
        yield two


@pytest.fixture
def delaying() -> Iterator[Box]:
    with Box(["a", "b"], delays=True) as two:
        yield two
