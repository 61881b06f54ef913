"""Tests of runs on a real GPU after failed tests."""

from __future__ import annotations

import os
from typing import Any

import pytest

from support.cuda.gpu_run import BROKEN_CODE, GpuRun


class _DriverError(Exception):
    pass


class _Gpu:
    failures = (_DriverError,)

    def __init__(self, is_broken: bool) -> None:
        self.is_broken = is_broken

    def synchronize(self) -> None:
        if self.is_broken:
            raise _DriverError("an illegal memory access")


def report_of(name: str, outcome: Any) -> pytest.TestReport:
    return pytest.TestReport(name, (name, 1, name), {}, outcome, None, "call")


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
