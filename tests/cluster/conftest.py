"""Child processes of tests of the cluster are forked: most of these tests start several."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.clusters.forking.forked_children import forked_children


@pytest.fixture(scope="module", autouse=True)
def _children_are_forked() -> Iterator[None]:
    with forked_children():
        yield
