"""Fixtures for tests of memberships."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.cluster.membership.authority import Authority
from support.wire.trust import authority


@pytest.fixture
def trust(tmp_path: Path) -> Authority:
    return authority(tmp_path)
