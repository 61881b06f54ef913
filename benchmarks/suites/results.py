"""Reads and prints the results of a suite's tests from their JUnit files."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

_FAILED = frozenset({"failure", "error"})

Outcomes = dict[str, dict[str, str]]


def count(report: Path) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name, kind = _file_of(case), _kind_of(case)
        counts.setdefault(name, Counter())[kind] += 1
        if kind == "failed":
            reason = next(child.get("message", "") for child in case if child.tag in _FAILED)
            print(f"failed {name}::{case.get('name')}: {' '.join(str(reason).split())[:160]}")
    return counts


def outcomes(folder: Path) -> Outcomes:
    found: Outcomes = {}
    for report in sorted(folder.glob("*.xml")):
        for case in ElementTree.parse(report).iter("testcase"):
            found.setdefault(_file_of(case), {})[str(case.get("name"))] = _kind_of(case)
    return found


def _file_of(case: ElementTree.Element) -> str:
    return str(case.get("classname")).rpartition(".")[2]


def _kind_of(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "skipped" if "skipped" in kinds else "failed" if kinds & _FAILED else "passed"


def print_comparison(servers: Mapping[str, Outcomes]) -> None:
    """Prints each server's passed tests by file in Markdown, and the tests that one server passes and another fails."""
    names = sorted({name for found in servers.values() for name in found})
    print(f"\n| file | {' | '.join(servers)} |\n|---|{'---|' * len(servers)}")
    for name in names:
        shares = " | ".join(_share(found.get(name, {})) for found in servers.values())
        print(f"| {name.removeprefix('test_')} | {shares} |")
    passed = {server: {name: _passed(found.get(name, {})) for name in names} for server, found in servers.items()}
    print(f"| sum | {' | '.join(str(sum(map(len, tests.values()))) for tests in passed.values())} |\n")
    for server, found in servers.items():
        for name in found:
            for test in sorted(set().union(*(tests[name] for tests in passed.values())) - passed[server][name]):
                print(f"{server} fails {name}::{test}")


def _passed(tests: Mapping[str, str]) -> set[str]:
    return {test for test, kind in tests.items() if kind == "passed"}


def _share(tests: Mapping[str, str]) -> str:
    kinds = Counter(tests.values())
    return f"{kinds['passed']} of {kinds['passed'] + kinds['failed']}" if tests else ""


def print_table(counts: dict[str, Counter[str]]) -> None:
    print(f"{'file':28} passed  failed  skipped")
    rows = [*sorted(counts.items()), ("sum", sum(counts.values(), Counter()))]
    for name, of in rows:
        print(f"{name:28} {of['passed']:6}  {of['failed']:6}  {of['skipped']:7}")
