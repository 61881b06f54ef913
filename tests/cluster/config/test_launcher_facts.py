"""Checks that every launcher has its facts, and that no product code compares launcher names."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from llamaclust.cluster.config.launcher_facts import LAUNCHERS, LauncherName
from support.paths import ROOT

_COMPARED = re.compile(r"launcher (==|!=|in|not in) ")


def test_each_launcher_has_facts() -> None:
    assert tuple(LAUNCHERS) == get_args(LauncherName)


@pytest.mark.parametrize("folder", ["cli", "cluster", "tools", "worker"])
def test_no_name_of_a_launcher_is_compared(folder: str) -> None:
    found = [path for path in (ROOT / folder).rglob("*.py") if _COMPARED.search(path.read_text())]
    assert not found
