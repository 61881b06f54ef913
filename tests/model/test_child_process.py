"""Checks that a child process for untrusted input cannot block its parent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llamaclust.core.errors import DeadlineError
from llamaclust.model.child_frames import decoded
from llamaclust.model.child_process import (
    BoundedChild,
    ChildEndedError,
    ChildKilledError,
    ChildLateError,
    ChildProgram,
    ChildUnusableError,
)
from support.clusters.served import until

PROGRAM = """
import sys, time
from llamaclust.model.child_frames import end_with_parent, read_frame_and_payload, write_frame
end_with_parent()
while True:
    frame, payload = read_frame_and_payload()
    if frame.get("sleep"):
        time.sleep(60)
    if frame.get("exit"):
        sys.exit(1)
    if frame.get("damage"):
        print("no JSON", flush=True)
    elif frame.get("cut"):
        print('[{}, 10]', flush=True)
        sys.exit(1)
    else:
        write_frame(frame, payload[::-1] * frame.get("times", 1))
"""


@pytest.fixture(autouse=True)
def _program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    source = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, source)))


@contextmanager
def child_of(wall_s: float = 60.0, **first: Any) -> Iterator[BoundedChild]:
    child = BoundedChild(ChildProgram("program", lambda: first, 60.0, wall_s, 1000), "child")
    with ExitStack() as ends:
        ends.callback(child.close)
        ends.callback(child.stop)
        yield child


def asked(child: BoundedChild, **values: Any) -> Mapping[str, Any]:
    return child.submit(lambda: child.request(values)).result(60)


def test_an_end_of_its_own_is_an_error_and_the_next_request_starts_another_child() -> None:
    with child_of(hello=1) as child:
        assert asked(child, a=1) == {"a": 1} and child.first_reply == {"hello": 1}
        first = child.pid
        for values, message in (
            ({"exit": 1}, "crashed"),
            ({"a": "a" * 1000}, "more than 1000 bytes"),
            ({"damage": 1}, "cannot be decoded"),
        ):
            with pytest.raises(ChildEndedError, match=message) as error:
                asked(child, **values)
            assert type(error.value) is ChildEndedError and child.pid is None
        assert asked(child, a=2) == {"a": 2} and child.pid not in (None, first)


def test_a_payload_travels_behind_the_line_both_ways_and_is_bounded() -> None:
    data = bytes(range(256)) * 3
    with child_of() as child:
        for payload in (b"", b"\n", data):
            reply = child.submit(partial(child.request_with_payload, {"a": 1}, payload, 1000)).result(60)
            assert reply == ({"a": 1}, payload[::-1])
        with pytest.raises(ChildEndedError, match="more than 1000 bytes"):
            child.submit(partial(child.request_with_payload, {"times": 2}, data, 1000)).result(60)
        with pytest.raises(ChildEndedError, match="crashed"):
            child.submit(partial(child.request_with_payload, {"cut": 1}, b"", 1000)).result(60)
        assert asked(child, a=2) == {"a": 2}


@pytest.mark.parametrize("line", [b"1", b"[]", b"[{}, -1]", b"[{}, true]", b"[1, 1]", b"[{}, 1, 1]", b"no"])
def test_other_lines_are_no_frames(line: bytes) -> None:
    with pytest.raises(ValueError):
        decoded(line)


def test_a_request_is_repeated_after_a_kill_from_outside() -> None:
    with child_of() as child:
        assert asked(child, a=1) == {"a": 1} and child.pid is not None
        os.kill(child.pid, signal.SIGTERM)
        assert asked(child, a=2) == {"a": 2}


def test_a_request_past_its_deadline_is_late_and_not_repeated() -> None:
    with child_of(wall_s=0.2) as child, pytest.raises(ChildLateError, match=r"within 0\.2 s"):
        asked(child, sleep=1)


def test_a_child_that_cannot_be_started_and_a_closed_one_are_errors_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with child_of() as child:
        with monkeypatch.context() as patched, pytest.raises(ChildKilledError, match="cannot be started: Resource"):
            patched.setattr(subprocess, "Popen", refused)
            asked(child, a=1)
        assert asked(child, a=1) == {"a": 1}
    with pytest.raises(DeadlineError, match="try again"):
        asked(child, a=1)


@pytest.mark.parametrize("first", [{"error": "no"}, {"exit": 1}])
def test_a_child_that_refuses_its_first_frame_is_unusable(first: dict[str, Any]) -> None:
    with child_of(**first) as child, pytest.raises(ChildUnusableError, match=r"no|crashed"):
        asked(child, a=1)


@pytest.mark.parametrize("starts", [True, False])
async def test_stop_ends_a_start_and_a_request(starts: bool) -> None:
    with child_of(sleep=starts) as child:
        running: Future[Any] = child.submit(lambda: child.request({"sleep": 1}))
        await until(lambda: child._process is not None and (starts or child.pid is not None))
        child.stop()
        with pytest.raises(ChildKilledError):
            running.result(60)
        assert child._process is None
    child.close()
