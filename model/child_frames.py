"""Exchanges frames (lines of JSON) between a process and its child, and ends the child with the process."""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any, Final

_MAX_REQUEST_BYTES: Final = 1 << 29
_SET_PARENT_DEATH_SIGNAL: Final = 1


def encoded(frame: Mapping[str, Any]) -> bytes:
    """Returns a line of ASCII. Raises TypeError, ValueError or RecursionError for values that JSON cannot hold."""
    return json.dumps(frame).encode() + b"\n"


def end_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends. Leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def read_frame() -> dict[str, Any]:
    line = sys.stdin.buffer.readline(_MAX_REQUEST_BYTES)
    if not line.endswith(b"\n"):
        sys.exit(2 if line else 0)
    frame: dict[str, Any] = json.loads(line)
    return frame


def write_frame(frame: Mapping[str, Any]) -> None:
    sys.stdout.buffer.write(encoded(frame))
    sys.stdout.buffer.flush()
