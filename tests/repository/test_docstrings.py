"""Checks that docstrings are sentences that can be understood without the name above them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.rule

FOLDERS = ("benchmarks", "cli", "cluster", "core", "kernels", "model", "tools", "wire", "worker")
FRAGMENTS = re.compile(
    r"(after|also|although|as|at|because|before|between|by|for|from|how|if|in|like|likewise|not|of|on|only|since|than|that"
    r"|to|unless|until|what|when|where|whether|which|while|whose|why|with|within|without)\b(?!-)",
    re.IGNORECASE,
)
"""First words of fragments."""


MOST_LINES = 0.06
"""The largest share of lines of Python that docstrings may take."""


def docstrings(path: Path) -> Iterator[tuple[int, str, int]]:
    """Yields the line, text and number of lines of the docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value, (node.end_lineno or node.lineno) - node.lineno + 1


def is_fragment(text: str) -> bool:
    return FRAGMENTS.match(text) is not None


@pytest.mark.parametrize("folder", [*FOLDERS, "examples", "tests"])
def test_docstrings_are_sentences(folder: str) -> None:
    found = [(path, *each) for path in sorted((ROOT / folder).rglob("*.py")) for each in docstrings(path)]
    assert found
    assert [f"{path}:{line}: {text}" for path, line, text, _ in found if is_fragment(text)] == []


def test_docstrings_are_few() -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    lines = sum(path.read_text().count("\n") for path in paths)
    taken = sum(count for path in paths for _, _, count in docstrings(path))
    assert taken <= MOST_LINES * lines, f"{taken} of {lines} lines are docstrings: delete what names and types say"


def test_fragments_are_found() -> None:
    assert is_fragment("Of each of `inner`.") and is_fragment("Whether it was there.")
    assert not is_fragment("Bias names, one per inner matrix.") and not is_fragment("")
