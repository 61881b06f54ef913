"""Tests of runs on a real GPU: the order of tests, their results, and the end of processes after failed tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llamaclust.kernels.cuda.runtime.device import Launch
from support.arithmetic.matmul_cases import check_equal_bits
from support.choice_plugin import Choice
from support.cuda.exact import same_bits
from support.cuda.gpu_run import BROKEN_CODE, GpuRun
from support.seed import SEED


class _DriverError(Exception):
    pass


class _Gpu:
    failures = (_DriverError,)

    def __init__(self, is_broken: bool) -> None:
        self.is_broken = is_broken

    def synchronize(self) -> None:
        if self.is_broken:
            raise _DriverError("an illegal memory access")


def report_of(name: str, outcome: Any, text: str | None = None, seconds: float = 0.0) -> pytest.TestReport:
    return pytest.TestReport(name, (name, 1, name), {}, outcome, text, "call", duration=seconds)


@pytest.mark.parametrize("is_worker", [False, True])
@pytest.mark.parametrize("outcome", ["passed", "failed", "skipped"])
@pytest.mark.parametrize("gpu", [None, _Gpu(False), _Gpu(True)], ids=["none", "whole", "broken"])
def test_only_workers_whose_context_a_test_has_broken_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_worker: bool, outcome: str, gpu: Any
) -> None:
    ended = list[int]()
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if is_worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    run = GpuRun(gpu)
    run.pytest_runtest_logreport(report_of("test_a", outcome))
    run.pytest_runtest_logfinish("test_a")
    has_failed = outcome == "failed"
    is_lost = is_worker and has_failed and gpu is not None and gpu.is_broken
    assert ended == [BROKEN_CODE] * is_lost
    told = "the GPU's context is broken after test_a: an illegal memory access\n" if is_lost else ""
    assert capsys.readouterr().err == ("failed: test_a (call)\n" if has_failed and not is_worker else told)
    run.pytest_runtest_logreport(report_of("test_b", "passed"))
    run.pytest_runtest_logfinish("test_b")
    assert len(ended) == is_lost, "a test that passed is no reason"


class _Item:
    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid


class _Config:
    """A configuration of pytest with the options of a run. Each run reads what earlier runs have written."""

    def __init__(self, results: Path, sources: str) -> None:
        self.option = self
        self.results, self.sources = results, sources
        self.hook, self.deselected = self, list[str]()

    def pytest_deselected(self, items: list[Any]) -> None:
        self.deselected = [item.nodeid for item in items]

    def ordered(self, *names: str) -> tuple[list[str], list[str]]:
        """Returns the tests in the order of a run, and those that are not repeated."""
        items: list[Any] = [_Item(name) for name in names]
        GpuRun.of(self).pytest_collection_modifyitems(self, items)  # type: ignore[arg-type]
        return [item.nodeid for item in items], self.deselected


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the results of a run that was killed while it wrote."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    run = GpuRun(results=tmp_path / "results", sources="s1")
    for name, outcome, seconds in (("slow", "passed", 3.0), ("bad", "failed", 5.0), ("quick", "passed", 1.0)):
        run.pytest_runtest_logreport(report_of(name, outcome, "numbers differ", seconds))
    with (tmp_path / "results").open("a") as file:
        file.write('{"test": "cut o')
    return tmp_path / "results"


def test_each_result_is_a_line(results: Path) -> None:
    slow, bad = map(json.loads, results.read_text().splitlines()[:2])
    assert slow == {"test": "slow", "outcome": "passed", "seconds": 3.0, "sources": "s1", "seed": SEED}
    assert (bad["outcome"], bad["message"], bad["text"]) == ("failed", "numbers differ", "numbers differ")


def test_failed_tests_come_first_and_short_before_long(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.cuda.gpu_run.recorded", lambda: {"long": 9.0})
    names = "slow", "long[a]", "new", "quick", "bad"
    assert _Config(results, "s1").ordered(*names) == (["bad", "new", "long[a]"], ["slow", "quick"])
    assert _Config(results, "s2").ordered(*names) == (["bad", "new", "long[a]", "quick", "slow"], [])
    assert _Config(results.with_name("none"), "s1").ordered(*names)[0] == ["slow", "new", "quick", "bad", "long[a]"]


def test_workers_have_the_order_of_the_process_that_started_them(results: Path) -> None:
    worker: Any = _Config(results, "s1")
    worker.workerinput = {"turns": {"slow": (0, 1.0)}}
    assert worker.ordered("slow", "bad", "quick") == (["slow", "bad", "quick"], [])


def test_failures_show_the_last_launches() -> None:
    run = GpuRun()
    report = report_of("test_a", "failed", "numbers differ")
    run.launched.append(Launch("elementwise.rows.add_rows", (5, 16, 1), (256, 1, 1), (np.int32(5001),)))
    wrapped = run.pytest_runtest_makereport()
    next(wrapped)
    with pytest.raises(StopIteration):
        wrapped.send(report)
    ((_, text),) = report.sections
    assert "elementwise.rows.add_rows" in text and "5001" in text
    run.pytest_runtest_logstart()
    assert not run.launched


def test_a_run_in_which_all_passed_before_has_passed() -> None:
    session: Any = SimpleNamespace(exitstatus=pytest.ExitCode.NO_TESTS_COLLECTED)
    GpuRun().pytest_sessionfinish(session)
    assert int(session.exitstatus) == 5
    GpuRun(turns={"test_a": (3, 1.0)}).pytest_sessionfinish(session)
    assert int(session.exitstatus) == 0


def test_the_first_value_that_differs_is_shown() -> None:
    wanted = np.array([[1, np.nan, 3], [0, 5, 6]], np.float32)
    found = wanted.copy()
    found.view(np.uint32)[0, 1] ^= 1  # another NaN
    same_bits(found, wanted)
    found[1] = -0.0, 5, 7
    shown = r"\['rms_norm', 3\]: 2 of 6 values of \(2, 3\) .*first \(1, 0\): .*-0.0.* \(0x80000000\) instead of .*0.0"
    with pytest.raises(AssertionError, match=shown):
        same_bits(found, wanted, "rms_norm", 3)
    with pytest.raises(AssertionError, match="3 of 6"):
        check_equal_bits(found, wanted)
    with pytest.raises(AssertionError, match=r"\(1, 3\), \(2, 3\)"):
        check_equal_bits(found[:1], wanted)


def test_a_worker_that_crashed_ends_no_run(request: pytest.FixtureRequest) -> None:
    Choice(request.config).pytest_testnodedown(object())
