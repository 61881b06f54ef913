"""The diff of an architecture in CONTRIBUTING.md is what the sources have: it comes out of them and goes in again."""

from __future__ import annotations

import ast
import re

from support.paths import ROOT

NAME, MOST_LINES = "smollm3", 60
DIFF = re.search(r"^```diff\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)


def hunks(diff: str) -> dict[str, list[tuple[str, str]]]:
    """By file, the text before and after; hunks are divided by @@."""
    files: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        path, _, body = part.partition("\n")
        files[path] = [
            (
                "".join(side[1:] for side in lines if side[0] == "-"),
                "".join(side[1:] for side in lines if side[0] == "+"),
            )
            for lines in (hunk.splitlines(keepends=True) for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE))
        ]
    return files


def test_the_diff_is_what_the_sources_have() -> None:
    assert DIFF is not None and len(DIFF[1].splitlines()) <= MOST_LINES
    files = hunks(DIFF[1])
    assert sum(path.endswith(".py") for path in files) == 2 and "docs/models.md" in files
    for path, changes in files.items():
        text = whole = (ROOT / path).read_text()
        for before, after in changes:
            assert whole.count(after) == 1, f"{path}: not there, or twice:\n{after}"
            text = text.replace(after, before)
        if path.endswith(".py"):
            assert NAME not in text.lower(), f"{path}: something of it is not in the diff"
            ast.parse(text)
