"""The parent's side of the process that renders chat templates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from threading import Event, Timer
from typing import Any

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
        self._input, self._output = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, frame: bytes, timeout_s: float) -> dict[str, Any]:
        """Sends a request, one line of JSON, and waits for the reply, another one."""
        is_late = Event()

        def end() -> None:
            is_late.set()
            self._process.kill()

        timer = Timer(timeout_s, end)
        timer.daemon = True
        timer.start()
        try:
            self._input.write(frame)
            self._input.flush()
            line = self._output.readline(self._max_reply_bytes + 1)
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            reply: dict[str, Any] = json.loads(line)
            return reply
        if is_late.is_set():
            raise NotInTime(f"it did not end within {timeout_s:g} s")
        if len(line) > self._max_reply_bytes:
            raise RenderingStopped(f"a reply of more than {self._max_reply_bytes} bytes")
        raise self._ending()

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
