"""Fixtures of a network in a box; tests are skipped with the reason where a machine has none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from box import Box, missing


@pytest.fixture(scope="session", autouse=True)
def _box_works() -> None:
    if (reason := missing()) is not None:
        pytest.skip(reason)


@pytest.fixture(params=[False, True], ids=["bridge", "delays"])
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    """Two hosts, a and b, on either kind of switch."""
    with Box(["a", "b"], delays=request.param) as two:
        yield two


@pytest.fixture
def delaying() -> Iterator[Box]:
    with Box(["a", "b"], delays=True) as two:
        yield two
