"""Runs a child process for untrusted input: starts it, sends requests with deadlines, and ends it. The child process
limits its own resources (`confinement`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Timer
from typing import IO, Any, Final, TypeVar

from llamaclust.core.errors import DeadlineError
from llamaclust.model.child_frames import decoded, encoded

_Result = TypeVar("_Result")
_Reply = tuple[dict[str, Any], bytes]

_KEPT_VARIABLES: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")
"""Environment variables that a child process inherits. All others are withheld, because they may hold secrets."""
_OTHERS_SIGNALS: Final = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
_TIME_SIGNALS: Final = (signal.SIGXCPU, signal.SIGPROF)
_END_S: Final = 5.0


class ChildEndedError(Exception):
    """The child process ended without a reply. The message gives the reason."""


class ChildKilledError(ChildEndedError):
    """The child process was killed from outside or could not be started. The request is not the cause."""


class ChildLateError(ChildEndedError):
    """The child process missed its deadline. Either the request takes too long, or the machine is stalled."""


class ChildUnusableError(ChildEndedError):
    """The child process refused its first frame, or ended while it handled its first frame."""


@dataclass(frozen=True, slots=True)
class ChildProgram:
    """The module, the first frame and the limits of a child process."""

    module: str
    first: Callable[[], Mapping[str, Any]]
    start_s: float
    wall_s: float  # Maximum duration of a request in seconds.
    max_line_bytes: int  # Maximum size of a reply without its payload.
    idle_s: float | None = None  # Seconds without a request after which the child is ended. None means never.


class BoundedChild:
    """A child process and the thread that owns it. A request starts the process if it is not running. Thread-safe."""

    def __init__(self, program: ChildProgram, name: str) -> None:
        self.pid: int | None = None  # Process id, or None if no child is ready for requests.
        self.first_reply: Mapping[str, Any] = {}
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False
        self._idle_end: Timer | None = None
        self._work: set[Future[Any]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @property
    def load(self) -> int:
        return len(self._work)

    def submit(self, work: Callable[[], _Result]) -> Future[_Result]:
        """Runs `work` on the owning thread. Only `work` may call `request`. Raises DeadlineError after `close`."""
        try:
            future = self._thread.submit(work)
        except RuntimeError:
            raise DeadlineError("the server is ending; try again") from None
        self._work.add(future)
        future.add_done_callback(self._work.discard)
        return future

    def request(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return self.request_with_payload(values)[0]

    def request_with_payload(
        self, values: Mapping[str, Any], payload: bytes = b"", max_payload_bytes: int = 0
    ) -> tuple[dict[str, Any], bytes]:
        """Sends a request to the child process and returns the reply with its payload. If the child is killed from
        outside, sends the request once more to a new child. Raises ChildEndedError, and the errors of `encoded`."""
        frame = encoded(values, payload)
        try:
            return self._request(frame, max_payload_bytes)
        except ChildKilledError:  # The child was killed during this request or earlier.
            return self._request(frame, max_payload_bytes)

    def stop(self) -> None:
        """Kills the child process. The current request and all later requests fail."""
        self._is_stopped = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """Waits until the child process has ended. Callers must call `stop` first, and may call `close` twice."""
        self._drop_later()
        self._thread.shutdown(wait=True)

    def _drop_later(self) -> None:
        with suppress(RuntimeError):  # A RuntimeError means that the thread has ended.
            self._thread.submit(self._drop)

    def _request(self, frame: bytes, max_payload_bytes: int) -> _Reply:
        if self._is_stopped:
            raise ChildKilledError("the child process was closed")
        if self._idle_end is not None:
            self._idle_end.cancel()
        try:
            process = self._process or self._start()
            reply = self._exchange(process, frame, self._program.wall_s, max_payload_bytes)
        except BaseException:
            self._drop()
            raise
        if self._program.idle_s is not None:
            self._idle_end = _timer(self._program.idle_s, self._drop_later)
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        first = encoded(self._program.first())
        self._process = process = self._popen()
        if self._is_stopped:  # `stop` may have run before `_process` was set.
            process.kill()
        try:
            reply, _ = self._exchange(process, first, self._program.start_s)
        except (ChildKilledError, ChildLateError):
            raise
        except ChildEndedError as failure:
            raise ChildUnusableError(str(failure)) from None
        if "error" in reply:
            raise ChildUnusableError(str(reply["error"]))
        self.first_reply, self.pid = reply, process.pid
        return process

    def _popen(self) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", self._program.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            )
        except OSError as error:  # For example, the limit on the number of processes is reached.
            raise ChildKilledError(f"the child process cannot be started: {error.strerror}") from error

    def _exchange(
        self, process: subprocess.Popen[bytes], frame: bytes, timeout_s: float, max_payload_bytes: int = 0
    ) -> _Reply:
        assert process.stdin is not None and process.stdout is not None
        is_late = Event()

        def end() -> None:
            is_late.set()
            process.kill()

        timer = _timer(timeout_s, end)
        reply: _Reply | None = None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(frame)
                process.stdin.flush()
                reply = _read_reply(process.stdout, self._program.max_line_bytes, max_payload_bytes)
        finally:
            timer.cancel()
        if reply is not None:
            return reply
        if is_late.is_set():
            raise ChildLateError(f"the child process did not reply within {timeout_s:g} s")
        raise _ending(process)

    def _drop(self) -> None:
        if self._idle_end is not None:
            self._idle_end.cancel()
        process, self._process, self.pid = self._process, None, None
        if process is not None:
            process.kill()
            process.communicate()


def _timer(seconds: float, call: Callable[[], None]) -> Timer:
    timer = Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer


def _read_reply(stream: IO[bytes], max_line_bytes: int, max_payload_bytes: int) -> _Reply | None:
    line = stream.readline(max_line_bytes + 1)
    if not line.endswith(b"\n"):
        _check_size(len(line), max_line_bytes)
        return None
    try:
        frame, size = decoded(line)
    except (ValueError, RecursionError):
        raise ChildEndedError("the child process's reply cannot be decoded") from None
    _check_size(size, max_payload_bytes)
    payload = stream.read(size)
    return (frame, payload) if len(payload) == size else None


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ChildEndedError(f"the child process's reply has more than {max_bytes} bytes")


def _ending(process: subprocess.Popen[bytes]) -> ChildEndedError:
    try:
        code = process.wait(_END_S)
    except subprocess.TimeoutExpired:
        return ChildEndedError("the child process does not reply")
    if -code in _OTHERS_SIGNALS:
        return ChildKilledError(f"the child process was killed by {signal.Signals(-code).name}")
    if -code in _TIME_SIGNALS:
        return ChildEndedError("the child process exceeded its CPU time limit")
    return ChildEndedError("the child process crashed")
