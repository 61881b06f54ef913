"""Checks that the example of a new architecture in CONTRIBUTING.md matches the sources."""

from __future__ import annotations

import ast

from support.diffs import diff_of, hunks
from support.paths import ROOT

NAME, MOST_LINES = "smollm3", 60


def test_the_diff_is_what_the_sources_have() -> None:
    diff = diff_of("Add an architecture")
    assert len(diff.splitlines()) <= MOST_LINES
    files = hunks(diff)
    assert sum(path.endswith(".py") for path in files) == 2 and "docs/models.md" in files
    for path, changes in files.items():
        text = whole = (ROOT / path).read_text()
        for before, after in changes:
            assert whole.count(after) == 1, f"{path}: not there, or twice:\n{after}"
            text = text.replace(after, before)
        if path.endswith(".py"):
            assert NAME not in text.lower(), f"{path}: something of it is not in the diff"
            ast.parse(text)
