"""Chooses the test cases of a run: a fixed core, and all cases of test files that a change affects.

`seconds.json` has the mean time of a case of each test in the last run with `--record`. Short tests have no entry.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path

from support.paths import TESTS

RECORD = TESTS / "seconds.json"
_WORTH_A_LINE_S = 0.1
_OTHERS_S = 0.03
"""Assumed seconds per case for tests without an entry."""

Seconds = Mapping[str, float]
"""Seconds per case, by test id without parameters."""


def recorded() -> Seconds:
    files: dict[str, dict[str, float]] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return {f"{file}::{name}": seconds for file, names in files.items() for name, seconds in names.items()}


def record(took: Mapping[str, float]) -> None:
    """Replaces the entries of tests that ran. `took` has the seconds of each case."""
    cases = defaultdict[str, list[float]](list)
    for node, seconds in took.items():
        cases[test_of(node)].append(seconds)
    means = {test: sum(each) / len(each) for test, each in cases.items()}
    files = defaultdict[str, dict[str, float]](dict)
    for test, seconds in sorted({**recorded(), **means}.items()):
        file, _, name = test.partition("::")
        if seconds >= _WORTH_A_LINE_S and (TESTS.parent / file).exists():
            files[file][name] = round(seconds, 1)
    RECORD.write_text(json.dumps(files, indent=1) + "\n")


def test_of(node: str) -> str:
    return node.partition("[")[0]


@dataclass(frozen=True)
class Cases:
    """The collected cases in order, with the seconds per case of each test."""

    nodes: tuple[str, ...]
    seconds: Seconds

    def took_s(self, nodes: Iterable[str]) -> float:
        return sum(self.seconds.get(test_of(node), _OTHERS_S) for node in nodes)

    def longest_files_first(self) -> tuple[str, ...]:
        """Returns the cases of the slowest files first, so that processes that share the files end at about the same
        time."""
        files = defaultdict[str, list[str]](list)
        for node in self.nodes:
            files[node.partition("::")[0]].append(node)
        return tuple(chain.from_iterable(sorted(files.values(), key=self.took_s, reverse=True)))

    def core(self, most_s: float, kept: Iterable[str] = (), whole: Iterable[str] = ()) -> set[str]:
        """Chooses all cases of tests in `whole`, and one case of others, always the same: first tests in `kept`, then
        the fastest tests within `most_s` seconds."""
        cases = defaultdict[str, list[str]](list)
        for node in self.nodes:
            cases[test_of(node)].append(node)
        for test in cases.keys() - {*whole}:
            cases[test] = [min(cases[test], key=lambda node: sha256(node.encode()).digest())]
        first = {*kept, *whole}
        order = sorted(cases, key=lambda test: (test not in first, self.took_s(cases[test]), test))
        chosen = set[str]()
        left_s = most_s
        for test in order:
            left_s -= self.took_s(cases[test])
            if left_s < 0 and test not in first:
                break
            chosen.update(cases[test])
        return chosen

    def whole_files(self, files: Iterable[Path], most_s: float) -> list[Path]:
        """Returns the first `files` whose cases take no more than `most_s` seconds together."""
        cases = defaultdict[Path, list[str]](list)
        for node in self.nodes:
            cases[Path(node.partition("::")[0])].append(node)
        taken = list[Path]()
        for file in files:
            most_s -= self.took_s(cases[file])
            if most_s < 0:
                break
            taken.append(file)
        return taken
