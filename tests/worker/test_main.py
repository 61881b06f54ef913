"""Tests of the worker process's exit codes and signals."""

from __future__ import annotations

import asyncio
import signal
import sys
from io import BytesIO
from types import SimpleNamespace

import pytest

from llamaclust.core.errors import LlamaclustError, RefusedError, UsageError, WorkerError
from llamaclust.worker import __main__ as process
from llamaclust.worker import main
from llamaclust.worker.settings import WorkerSettings

_OF_THE_PROCESS = ("start_logging", "allow_many_files", "request_slices", "share_interpreter", "collect_rarely")


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("error", [RefusedError("the name a is taken"), WorkerError("the coordinator is gone")])
def test_errors_are_logged_and_decide_the_exit_code(
    error: LlamaclustError, is_static: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The actor of a Ray worker starts a refused worker again, which it recognizes by the code of UsageError."""

    async def run(settings: WorkerSettings) -> int:
        raise error

    for module, names in ((main, _OF_THE_PROCESS), (process, ("tune_grpc", "collect_rarely"))):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr(main, "gc", SimpleNamespace(freeze=lambda: None))
    monkeypatch.setattr(main, "_until_signal", run)
    monkeypatch.setattr(main, "end_process", sys.exit)
    settings = WorkerSettings(name="a", static=is_static)
    monkeypatch.setattr(sys, "argv", ["worker", "--name", "a"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(settings.to_json().encode())))
    with pytest.raises(SystemExit) as ended:
        process.main()
    assert ended.value.code == (UsageError.exit_code if isinstance(error, UsageError) else 1)
    assert [(record.levelname, record.message) for record in caplog.records] == [("ERROR", str(error))]


def test_signals_are_ignored_while_the_event_loop_of_an_ended_worker_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ended(settings: WorkerSettings) -> str:
        return "the cluster was stopped"

    async def handlers() -> list[object]:
        await main._until_signal(WorkerSettings(name="a"))
        return [signal.getsignal(number) for number in before]

    monkeypatch.setattr(main, "_run_started_worker", ended)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert asyncio.run(handlers()) == [signal.SIG_IGN] * 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
