"""Tests of the last error in a worker's log, among lines of libraries."""

from __future__ import annotations

import asyncio
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Any

import pytest

from llamaclust.cluster.membership import log_tail
from llamaclust.cluster.membership.join_rules import JoinSettings
from llamaclust.cluster.membership.log_tail import last_error, recent_error
from llamaclust.cluster.membership.registry import Registry
from llamaclust.core.errors import LlamaclustError, LoadCancelledError, ModelFileError, WorkerError
from llamaclust.core.logs import RECENT_S
from llamaclust.wire.control.messages import Deadlines, LoadFailed, WorkerMessage
from llamaclust.wire.security.credentials import Insecure
from llamaclust.worker.session import Session
from llamaclust.worker.stage.counters import Counters
from support.clusters.members import join
from support.wire.control_messages import REGISTER

OWN = "2026-01-01 10:00:01,123 ERROR layer 7 does not fit"
TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\nValueError: seven'
RAY = (
    "/usr/lib/python3.11/site-packages/ray/_private/worker.py:2062: FutureWarning: Tip: In future versions of Ray, Ray "
    "will no longer override accelerator visible devices env var if num_gpus=0 or num_gpus=None (default). To enable "
    "this behavior and turn off this error message, set RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0\n  warnings.warn("
)
HARMLESS = {
    "Ray's notice": RAY,
    "a warning without its source": "<string>:1: DeprecationWarning: old",
    "a warning of the interpreter": "sys:1: ResourceWarning: unclosed file <_io.BufferedReader name=3>",
    "a warning of several lines": "/a/numpy/core.py:9: RuntimeWarning: overflow\nin a product\nof two\n  return x * y",
    "a class of a library's own": "/a b/c.py:12: CuPyWarning: no CUDA\n\twarnings.warn(text)",
    "Abseil before its start": "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    "Abseil": "I0000 00:00:1700000000.123456    4321 chttp2_transport.cc:1182] GOAWAY received",
    "Abseil's warning": "W0000 00:00:1700000000.123456 4321 fork.cc:63] Other threads are running",
    "glog": "W1126 11:09:34.123456  4321 file.cc:77] retrying",
    "glog with a year": "I20261126 11:09:34.123456  4321 file.cc:77] retrying",
    "Ray's processes": "[2026-11-26 11:09:34,123 W 4321 4321] (raylet) core_worker.cc:1: slow",
    "Ray in Python": "2026-11-26 11:09:34,123\tINFO worker.py:1843 -- Started a local Ray instance.",
    "plain": "INFO: loaded",
}
ERRORS = {
    "E0000 00:00:1700000000.123456 4321 chttp2.cc:1] bind failed": "bind failed",
    "F1126 11:09:34.123456  4321 file.cc:77] Check failed: x == y": "Check failed: x == y",
    "[2026-11-26 11:09:34,123 C 4321 4321] core_worker.cc:9: no memory": "core_worker.cc:9: no memory",
    "2026-11-26 11:09:34,123\tERROR worker.py:409 -- the actor died": "the actor died",
    "free(): invalid pointer": "free(): invalid pointer",
    "CUDA: out of memory": "CUDA: out of memory",
    "IOERROR: the disk is gone": "IOERROR: the disk is gone",
    "DISK: full": "DISK: full",
    "Warning: something that no form knows": "Warning: something that no form knows",
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "a.log"


@pytest.mark.parametrize("noise", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_libraries_say_besides_is_no_trouble(log: Path, noise: str) -> None:
    log.write_text(f"{noise}\n")
    assert last_error(log) == ""
    for before, words in ((OWN, "layer 7 does not fit"), (TRACE, "ValueError: seven")):
        log.write_text(f"{noise}\n{before}\n{noise}\n{noise}\n")
        assert last_error(log) == words


@pytest.mark.parametrize(("error", "words"), ERRORS.items(), ids=range(len(ERRORS)))
def test_errors_of_libraries_are(log: Path, error: str, words: str) -> None:
    log.write_text(f"{OWN}\n{error}\n{RAY}\n")
    assert last_error(log) == words


@pytest.mark.parametrize("end", [OWN, TRACE])
def test_a_warning_without_its_source_hides_nothing_behind_it(log: Path, end: str) -> None:
    log.write_text(f"/a.py:1: UserWarning: odd\n{end}\n")
    assert last_error(log) == {OWN: "layer 7 does not fit", TRACE: "ValueError: seven"}[end]


def test_a_very_long_warning_hides_nothing(log: Path) -> None:
    lines = [f"line {number}" for number in range(20)]
    log.write_text("\n".join(["/a.py:1: UserWarning: odd", *lines, "  warn()"]))
    assert last_error(log) == "line 19"


@pytest.mark.parametrize(("start", "words"), [(0, "after"), (7, ""), (6000, "after"), (1 << 20, "after")])
def test_a_log_that_was_emptied_is_read_from_its_beginning(start: int, words: str, tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("after\n\n")
    assert last_error(log, start) == words


def _text(at_s: float, level: str, words: str) -> str:
    return f"{datetime.fromtimestamp(at_s).strftime('%Y-%m-%d %H:%M:%S')},000 {level} {words}"


def _logfmt(at_s: float, level: str, words: str) -> str:
    return f'time={datetime.fromtimestamp(at_s, UTC).isoformat()} level={level.lower()} msg="{words}"'


def _json(at_s: float, level: str, words: str) -> str:
    at = datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return f'{{"time": "{at}", "level": "{level.lower()}", "msg": "{words}"}}'


@pytest.mark.parametrize("form", [_text, _logfmt, _json])
@pytest.mark.parametrize("old", ["ProfileWorker: cancelled", "epoch 0.1: no memory", "the link to b broke"])
def test_an_old_error_is_no_cause(form: Any, old: str, log: Path) -> None:
    now_s = time()
    before_s = now_s - RECENT_S - 60
    old_line, traceback = form(before_s, "ERROR", old), TRACE
    log.write_text(f"{old_line}\n")
    assert last_error(log) == old and recent_error(log) == ""
    log.write_text(f"{old_line}\n{form(now_s, 'INFO', 'goes on')}\n")
    assert recent_error(log) == ""
    log.write_text(f"{traceback}\n{form(before_s, 'INFO', 'goes on')}\n")
    assert recent_error(log) == "", "a line without a time is as old as the line after it"
    log.write_text(f"{old_line}\n{form(now_s, 'ERROR', 'the disk is full')}\n")
    assert recent_error(log) == "the disk is full"
    log.write_text(f"{old_line}\n{traceback}\n")
    assert recent_error(log) == "ValueError: seven", "the process wrote the traceback when it ended"
    os.utime(log, (before_s, before_s))
    assert recent_error(log) == ""


@pytest.mark.parametrize(
    ("error", "is_error"),
    [
        (LoadCancelledError("the measurement was cancelled"), False),
        (LoadCancelledError("the load was cancelled"), False),
        (ModelFileError("m.gguf is damaged"), True),
        (WorkerError("no connection to worker b"), True),
        (ValueError("seven"), True),
    ],
)
async def test_work_that_the_coordinator_cancels_is_no_error_of_the_worker(
    error: Exception, is_error: bool, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[WorkerMessage] = []

    async def send(message: WorkerMessage) -> None:
        told.append(message)

    async def fails() -> WorkerMessage:
        raise error

    worker: Any = None
    caplog.set_level(logging.INFO)
    session = Session(worker, Insecure(), Deadlines(), Counters(), send)
    await session.answer(fails(), lambda failure: LoadFailed(3, failure), "ProfileWorker")
    (record,), (answer,) = caplog.records, told
    assert (record.levelno >= logging.WARNING) == is_error
    kind = type(error) if isinstance(error, LlamaclustError) else LlamaclustError
    assert isinstance(answer, LoadFailed) and answer.failure.kind == kind.__name__


@pytest.mark.parametrize("form", [_text, _logfmt, _json])
@pytest.mark.parametrize("silent_s", [0.0, 5.0, 30.0, 600.0])
def test_an_error_shortly_before_the_last_sign_of_life_is_a_cause(form: Any, silent_s: float, log: Path) -> None:
    sign_s = time() - silent_s
    log.write_text(f"{form(sign_s - 1, 'ERROR', 'the disk fails')}\n")
    os.utime(log, (sign_s - 1, sign_s - 1))
    assert recent_error(log, silent_s=silent_s) == "the disk fails"
    log.write_text(f"{form(sign_s - RECENT_S - 60, 'ERROR', 'the disk fails')}\n")
    assert recent_error(log, silent_s=silent_s) == ""


@pytest.mark.parametrize(("age_s", "words"), [(0.0, "the disk fails"), (60.0, "")])
@pytest.mark.parametrize("is_killed", [False, True], ids=["it hangs", "it is killed"])
async def test_a_loss_has_the_error_before_the_last_heartbeat(
    age_s: float, words: str, log: Path, monkeypatch: pytest.MonkeyPatch, *, is_killed: bool
) -> None:
    """The time without heartbeats is longer than an error is recent."""
    monkeypatch.setattr(log_tail, "RECENT_S", 0.2)

    def read(name: str, silent_s: float) -> str:
        return recent_error(log, 0, silent_s)

    def write() -> None:
        log.write_text(f"{_json(time() - age_s, 'ERROR', 'the disk fails')}\n")

    async with Registry("127.0.0.1:0", Insecure(), read, JoinSettings(1.0)) as registry:
        await join(registry, Insecure(), REGISTER)
        write()
        handle = registry.workers["a"]
        if is_killed:
            registry.process_exited("a", "killed")
        async with asyncio.timeout(60):
            await handle.lost.wait()
        assert handle.loss is not None and handle.loss.last_error == words
        assert str(handle.loss) == ("killed" if is_killed else "no heartbeat for 1 s")
