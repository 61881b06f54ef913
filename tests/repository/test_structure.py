"""Checks limits on the structure of the source. `make structure` prints the figures."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from support.paths import ROOT
from support.structure import (
    Modules,
    arrows,
    circle,
    circle_of,
    deepest,
    files_in_folders,
    folders_in_folders,
    longest,
)

pytestmark = pytest.mark.rule

MOST_FILES = 20
MOST_FOLDERS = 12
LARGE = {Path("kernels/cpu/native/level/quants")}
"""Folders that may have more files."""
MOST_DEPTH = {"module-level": 18, "lazy": 18}
"""Maximum number of modules in a chain of imports from the command line to a native call."""
MOST_MODULES_IN_A_CHAIN = 28
"""Maximum number of modules in a chain of imports, including imports inside functions."""


@cache
def modules() -> Modules:
    if subprocess.run(["git", "ls-files", "cli"], cwd=ROOT, capture_output=True, check=False).stdout == b"":
        pytest.skip("not a git checkout")
    return Modules.read()


def test_folders_are_small() -> None:
    modules()
    assert {path for path, count in files_in_folders().items() if count > MOST_FILES} <= LARGE
    assert {path: count for path, count in folders_in_folders().items() if count > MOST_FOLDERS} == {}


@pytest.mark.parametrize("kind", MOST_DEPTH)
def test_imports_have_no_circle_and_a_bounded_depth(kind: str) -> None:
    graph = modules().graph(lazy=kind == "lazy")
    assert circle(graph) == []
    chain = deepest(graph)
    assert chain and len(chain) <= MOST_DEPTH[kind], " > ".join(chain)


def test_the_longest_chain_of_imports_is_bounded() -> None:
    chain = longest(modules().graph(lazy=True))
    assert len(chain) <= MOST_MODULES_IN_A_CHAIN, " > ".join(chain)


@pytest.mark.parametrize(
    "package", ["llamaclust.cluster", "llamaclust.cluster.front", "llamaclust.cluster.front.dialects"]
)
def test_rooms_have_no_circle(package: str) -> None:
    assert circle_of(arrows(modules().graph(lazy=True), package)) == "none"


def test_what_all_apis_share_knows_no_web_framework() -> None:
    shared = ["errors", "json_text", "schema", "shared_fields", "settings"]
    imports = "; ".join(f"import llamaclust.cluster.front.{name}" for name in shared)
    code = f"import sys; {imports}; print(*sorted({{'starlette', 'uvicorn'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "\n"
