"""Runs on a real GPU: a plugin orders tests, writes each result at once, and ends processes whose context is broken."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llamaclust.kernels.cuda.runtime.cupy_device import CupyDevice
from llamaclust.kernels.cuda.runtime.device import Device, Launch
from support.choice import recorded, test_of
from support.seed import SEED

BROKEN_CODE = 17
_LAUNCHES, _MESSAGE_LETTERS = 12, 300
_FAILED, _NEW, _PASSED_BEFORE, _PASSED = range(4)
"""Turns of tests by their last result. Tests that passed with the present sources are not repeated."""


class RecordingGpu(CupyDevice):
    """A GPU that adds each launch to `launched`."""

    def __init__(self, folder: Path, launched: deque[Launch]) -> None:
        super().__init__(0, folder=folder)
        self._launched = launched

    def launch(self, launch: Launch) -> None:
        self._launched.append(launch)
        super().launch(launch)


@dataclass(eq=False)
class GpuRun:
    """A pytest plugin. The process that writes to `results` gives `turns`, the turn and seconds of tests that ran
    earlier, to xdist's workers. Workers with a broken context exit and are replaced."""

    device: Device | None = None
    has_failed: bool = False
    results: Path | None = None
    sources: str = ""  # Identifies the tested sources.
    turns: dict[str, tuple[int, float]] = field(default_factory=dict)
    launched: deque[Launch] = field(default_factory=lambda: deque(maxlen=_LAUNCHES))

    @classmethod
    def of(cls, config: pytest.Config) -> GpuRun:
        results, sources = config.option.results, config.option.sources
        given: dict[str, Any] | None = getattr(config, "workerinput", None)
        return cls(results=results, sources=sources, turns=given["turns"] if given else _turns(results, sources))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["turns"] = self.turns

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Puts failed tests first, and shorter tests before longer ones."""
        seconds = recorded()
        keys = {one: self.turns.get(one.nodeid, (_NEW, seconds.get(test_of(one.nodeid), 0.0))) for one in items}
        config.hook.pytest_deselected(items=[item for item in items if keys[item][0] == _PASSED])
        items[:] = sorted((item for item in items if keys[item][0] != _PASSED), key=keys.__getitem__)

    def pytest_runtest_logstart(self) -> None:
        self.launched.clear()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Any:
        report: pytest.TestReport = yield
        if report.failed and self.launched:
            report.sections.append(("Last launches", "\n".join(map(str, self.launched))))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.has_failed = self.has_failed or report.failed
        if _is_worker():
            return
        if report.failed:
            _tell(f"failed: {report.nodeid} ({report.when}) {_message(report)}".rstrip())
        if self.results is not None and (report.failed or report.skipped or report.when == "call"):
            with self.results.open("a") as file:
                file.write(json.dumps(self._line(report)) + "\n")

    def _line(self, report: pytest.TestReport) -> dict[str, Any]:
        found = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        found |= {"sources": self.sources, "seed": SEED}
        if report.failed:
            found |= {"message": _message(report), "text": report.longreprtext, "sections": report.sections}
        return found

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        device, has_failed, self.has_failed = self.device, self.has_failed, False
        if device is None or not has_failed or not _is_worker():
            return
        try:
            device.synchronize()
        except device.failures as error:
            _tell(f"the GPU's context is broken after {nodeid}: {error}")
            os._exit(BROKEN_CODE)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.turns:
            session.exitstatus = pytest.ExitCode.OK


def _turns(results: Path | None, sources: str) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = {}
    for text in results.read_text().splitlines() if results is not None and results.exists() else ():
        with suppress(ValueError):  # The last line is incomplete if its process was killed.
            line = json.loads(text)
            passed = _PASSED if line["sources"] == sources else _PASSED_BEFORE
            found[line["test"]] = (_FAILED if line["outcome"] == "failed" else passed, line["seconds"])
    return found


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = report.longreprtext if crash is None else crash.message
    return " ".join(text[:_MESSAGE_LETTERS].split())


def _is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
