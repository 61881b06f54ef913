"""Checks that held faults end with the run, even if their requests are still in progress."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.core.errors import LlamaclustError
from llamaclust.tools.chaos.injector import Drains, Injector
from llamaclust.tools.chaos.schedule import Fault, FaultKind
from llamaclust.tools.chaos.targets import Permissions


class SlowApi:
    """An API whose drains wait for `moved` and that records requests in order of completion."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.begun, self.moved = threading.Event(), threading.Event()

    def __enter__(self) -> SlowApi:
        return self

    def __exit__(self, *error: object) -> None: ...

    def drain(self, name: str) -> None:
        self.begun.set()
        assert self.moved.wait(60)
        self.done.append(f"drain {name}")

    def undrain(self, name: str) -> None:
        self.done.append(f"undrain {name}")


def test_a_drain_under_way_is_awaited_before_its_worker_is_undrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = SlowApi()
    monkeypatch.setattr(Drains, "_api", lambda self: api)
    drains = Drains(tmp_path, "tiny")
    drains.add("a")
    begin = threading.Thread(target=drains.begin, args=["a"])
    begin.start()
    assert api.begun.wait(60)
    end = threading.Thread(target=drains.end, args=["a"])
    end.start()
    end.join(0.05)
    assert api.done == []
    api.moved.set()
    begin.join()
    end.join()
    assert api.done == ["drain a", "undrain a"] and not drains.names
    drains.begin("a")  # a drain whose thread starts too late
    assert api.done == ["drain a", "undrain a"]


def test_a_coordinator_without_status_is_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def status(self: Injector) -> Any:
        raise LlamaclustError("tiny does not answer")

    monkeypatch.setattr(Injector, "_status", status)
    lines: list[str] = []
    injector = Injector(tmp_path, "tiny", Permissions(True, False), lines.append)
    targets: Any = SimpleNamespace(coordinator=SimpleNamespace(send=pytest.fail))
    assert not asyncio.run(injector.inject(Fault(FaultKind.COORDINATOR_KILL, "tiny", 0.0), targets))
    assert lines == ["the coordinator is not killed, because its state is unknown: tiny does not answer"]


@pytest.mark.parametrize("allowed", [False, True], ids=["standbys alone", "whatever restarts it"])
async def test_a_kill_of_the_coordinator_that_takes_the_last_standby_is_said(
    allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record: Any = SimpleNamespace(api="http://127.0.0.1:1")

    async def successor(self: Injector, killed: object) -> Any:
        return record

    monkeypatch.setattr(Injector, "_status", lambda self: (record, {}))
    monkeypatch.setattr(Injector, "_successor", successor)
    monkeypatch.setattr(Injector, "_folder", SimpleNamespace(has_standby=False))
    lines: list[str] = []
    injector = Injector(tmp_path, "tiny", Permissions(allowed, False), lines.append)
    targets: Any = SimpleNamespace(coordinator=SimpleNamespace(send=lambda number: True))
    assert await injector.inject(Fault(FaultKind.COORDINATOR_KILL, "tiny", 0.0), targets)
    assert lines == ([] if allowed else ["no standby is left, so the coordinator is not killed again"])
