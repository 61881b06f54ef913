"""A pytest plugin with options that choose test cases (see `choice`), and a summary of the choice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from support.choice import Cases, record, recorded, test_of
from support.paths import TESTS
from support.reach import Sources, changed_since, reached

_QUARANTINE = TESTS / "quarantine.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("choice of cases")
    group.addoption("--core", type=float, metavar="S", help="a case of each test, quickest first, up to S seconds")
    group.addoption("--since", metavar="COMMIT", help="also all cases of test files that changes since then reach")
    group.addoption("--most", type=float, default=400.0, metavar="S", help="seconds of those files, nearest first")
    group.addoption("--record", action="store_true", help="write the seconds of each test to tests/seconds.json")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "promise: a case in each core, whatever it takes")
    config.addinivalue_line("markers", "rule: checks all files; all its cases are in each core")
    config.pluginmanager.register(Choice(config))


class Choice:
    """Chooses the cases of a run. With xdist, the controller finds the affected files, and all workers make the same
    choice."""

    def __init__(self, config: pytest.Config) -> None:
        self._options = config.option
        self._output: dict[str, Any] | None = getattr(config, "workeroutput", None)  # None without xdist.
        self._lines: list[str] = []
        self._took = defaultdict[str, float](float)
        given: dict[str, Any] = getattr(config, "workerinput", {})
        self._chains: dict[str, list[str]] = given["chains"] if given else self._reached()

    def _reached(self) -> dict[str, list[str]]:
        """Returns the chain of imports from each affected test file to a changed file, nearest files first."""
        commit = self._options.since
        changed = changed_since(commit) if commit else []
        if changed is None:
            raise pytest.UsageError(f"--since {commit}: no commit of this repository")
        chains = reached(changed, Sources.read()) if changed else {}
        return {str(path): [*map(str, chain)] for path, chain in chains.items()}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["chains"] = self._chains

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        given = getattr(node, "workeroutput", {})  # A worker that crashed has none.
        self._lines = given.get("choice", self._lines)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        quarantined = dict(_quarantined())
        for item in items:
            if (reason := quarantined.get(item.nodeid)) is not None:
                item.add_marker(pytest.mark.xfail(strict=False, reason=reason))
        cases = Cases(tuple(item.nodeid for item in items), recorded())
        if self._output is not None:
            places = {node: place for place, node in enumerate(cases.longest_files_first())}
            items.sort(key=lambda item: places[item.nodeid])
        if self._options.core is None:
            return
        promises, rules = (_marked(items, name) for name in ("promise", "rule"))
        core = cases.core(self._options.core, promises, rules)
        whole = {*map(str, cases.whole_files(map(Path, self._chains), self._options.most))}
        chosen = {node for node in cases.nodes if node in core or node.partition("::")[0] in whole}
        self._lines = [*_summary(cases, core, whole, chosen, self._chains)]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._took[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        if self._output is not None:
            self._output["choice"] = self._lines
        elif self._options.record:
            record(self._took)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self._lines:
            terminalreporter.line(line)
        if self._options.core is not None:
            terminalreporter.line(f"quarantined tests, whose failures do not count: {len([*_quarantined()])}")


def _marked(items: Iterable[pytest.Item], marker: str) -> set[str]:
    return {test_of(item.nodeid) for item in items if item.get_closest_marker(marker)}


def _summary(
    cases: Cases, core: set[str], whole: set[str], chosen: set[str], chains: Mapping[str, list[str]]
) -> Iterator[str]:
    tests = len({*map(test_of, cases.nodes)})
    in_core = len({*map(test_of, core)})
    yield f"core: {len(core)} cases of {in_core} of {tests} tests, {cases.took_s(core):.0f} recorded seconds"
    if chains:
        yield f"the change reaches {len(chains)} test files; whole, with all their cases, run the nearest {len(whole)}:"
        yield from (f"  {' < '.join(reversed(chain))}" for file, chain in chains.items() if file in whole)
    every_s = cases.took_s(cases.nodes)
    yield f"chosen: {len(chosen)} of {len(cases.nodes)} cases, {cases.took_s(chosen):.0f} of {every_s:.0f} seconds"


def _quarantined() -> Iterator[tuple[str, str]]:
    """Yields the test ids and reasons from lines of the form `NODE  REASON`."""
    for line in _QUARANTINE.read_text().splitlines():
        if line and not line.startswith("#"):
            node, _, reason = line.partition("  ")
            yield node, reason.strip()
