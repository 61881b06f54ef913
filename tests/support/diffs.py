"""Reads the example diffs in CONTRIBUTING.md."""

from __future__ import annotations

import re

from support.paths import ROOT


def diff_of(section: str) -> str:
    """Returns the diff in the section with this title."""
    found = re.search(
        rf"^## {section}$.*?^```diff\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None, section
    return found[1]


def hunks(diff: str) -> dict[str, list[tuple[str, str]]]:
    """Returns the text before and after each hunk, by file. Lines with @@ separate hunks."""
    files: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        path, _, body = part.partition("\n")
        hunks_of_file = (hunk.splitlines(keepends=True) for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE))
        files[path] = [
            (
                "".join(line[1:] for line in lines if line[0] != "+"),
                "".join(line[1:] for line in lines if line[0] != "-"),
            )
            for lines in hunks_of_file
        ]
    return files
