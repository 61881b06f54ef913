"""Exchanges frames with a child process. A frame begins with a line of JSON, which is an object, or a list of an object
and a number. The number is the size in bytes of the payload after the line."""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any, Final

_MAX_REQUEST_BYTES: Final = 1 << 29
_SET_PARENT_DEATH_SIGNAL: Final = 1


def encoded(frame: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """Returns a frame as bytes: a line of ASCII JSON, and the payload. Raises the errors of `json.dumps`: TypeError,
    ValueError or RecursionError."""
    return json.dumps([frame, len(payload)] if payload else frame).encode() + b"\n" + payload


def decoded(line: bytes) -> tuple[dict[str, Any], int]:
    """Returns the object and the payload's size in bytes from a frame's line. Raises ValueError if invalid."""
    values = json.loads(line)
    frame, size = values if isinstance(values, list) and len(values) == 2 else (values, 0)
    if not isinstance(frame, dict) or type(size) is not int or size < 0:
        raise ValueError("the line is not a frame")
    return frame, size


def end_with_parent() -> None:
    """Makes Linux kill this process when its parent thread ends. Also makes this process ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def read_frame() -> dict[str, Any]:
    return read_frame_and_payload()[0]


def read_frame_and_payload() -> tuple[dict[str, Any], bytes]:
    line = sys.stdin.buffer.readline(_MAX_REQUEST_BYTES)
    if not line.endswith(b"\n"):
        sys.exit(2 if line else 0)
    frame, size = decoded(line)
    payload = sys.stdin.buffer.read(size)
    if len(payload) < size:
        sys.exit(2)
    return frame, payload


def write_frame(frame: Mapping[str, Any], payload: bytes = b"") -> None:
    sys.stdout.buffer.write(encoded(frame, payload))
    sys.stdout.buffer.flush()
