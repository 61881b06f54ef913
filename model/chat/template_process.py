"""The parent's side of the process that renders chat templates."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

from llamaclust.model.chat.template_frames import FRAME_LENGTH

_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")
"""Variables for Python's start and for dates in templates; keys and tokens are not passed."""
_OTHERS_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
_END_S = 1.0
"""Deadline from the child's last byte to its exit."""


class RenderingStopped(Exception):
    """The child ended, or did not answer in time; the message says how."""


class ProcessKilled(RenderingStopped):
    """The child was killed from outside, not by a template."""


class NotInTime(RenderingStopped):
    """No reply within the deadline: a slow template or a stalled machine."""


class TemplateProcess:
    """The rendering process and its two pipes."""

    def __init__(self, max_reply_bytes: int) -> None:
        self._max_reply_bytes = max_reply_bytes
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llamaclust.model.chat.template_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input = self._process.stdin.fileno()
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._input, False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, frame: bytes, timeout_s: float) -> dict[str, Any]:
        """Sends a request and waits for the reply."""
        deadline = time.monotonic() + timeout_s
        try:
            self._write(frame, deadline)
            length = FRAME_LENGTH.unpack(self._read(FRAME_LENGTH.size, deadline))[0]
            if length > self._max_reply_bytes:
                raise RenderingStopped(f"a reply of {length} bytes")
            reply: dict[str, Any] = json.loads(self._read(length, deadline))
        except TimeoutError:
            raise NotInTime(f"it did not end within {timeout_s:g} s") from None
        except (BrokenPipeError, EOFError):
            raise self._ending() from None
        return reply

    def stop(self) -> None:
        """Makes the process end; may be called from any thread."""
        self._process.kill()

    def kill(self) -> None:
        """Ends the process and its pipes."""
        self._process.kill()
        self._process.communicate()

    def _ending(self) -> RenderingStopped:
        """How the child ended, which has closed its pipes."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return RenderingStopped("its process does not answer")
        if -code in _OTHERS_SIGNALS:
            return ProcessKilled(f"its process was killed by {signal.Signals(-code).name}")
        if code == -signal.SIGXCPU:
            return RenderingStopped("it used more CPU time than a template may")
        return RenderingStopped("it crashed the process that rendered it")

    def _write(self, data: bytes, deadline: float) -> None:
        rest = memoryview(data)
        while rest:
            _wait_for(self._input, select.POLLOUT, deadline)
            rest = rest[os.write(self._input, rest) :]

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            _wait_for(self._output, select.POLLIN, deadline)
            chunk = os.read(self._output, min(count - len(data), 1 << 20))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)


def _wait_for(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
