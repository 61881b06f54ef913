"""Results of a suite's tests, read from their JUnit file."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

_FAILED = frozenset({"failure", "error"})


def count(report: Path) -> dict[str, Counter[str]]:
    """Passed, failed and skipped cases by file; the reason of each failure is printed."""
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "skipped" if "skipped" in kinds else "failed" if kinds & _FAILED else "passed"
        name = str(case.get("classname")).rpartition(".")[2]
        counts.setdefault(name, Counter())[kind] += 1
        if kind == "failed":
            reason = next(child.get("message", "") for child in case if child.tag in _FAILED)
            print(f"failed {name}::{case.get('name')}: {' '.join(str(reason).split())[:160]}")
    return counts


def print_table(counts: dict[str, Counter[str]]) -> None:
    print(f"{'file':28} passed  failed  skipped")
    rows = [*sorted(counts.items()), ("sum", sum(counts.values(), Counter()))]
    for name, of in rows:
        print(f"{name:28} {of['passed']:6}  {of['failed']:6}  {of['skipped']:7}")
