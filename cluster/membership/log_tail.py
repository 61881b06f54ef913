"""Finds the last error in the log of a worker."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from time import time

from llamaclust.core.bounds import line, one_line
from llamaclust.core.logs import RECENT_S, logged_at_s, read_line
from llamaclust.core.regular_file import open_regular

_READ_BYTES = 1 << 16
_HARMLESS = ("DEBUG", "INFO")
_PYTHON_WARNING = re.compile(r"\S.*:\d+: [A-Z]\w*Warning: ")
_MOST_WARNING_LINES = 8
_TRACEBACK = "Traceback (most recent call last):"
_OTHER_LOGGERS = (
    re.compile(r"(?P<level>[IWEF])\d{4}(?:\d{4})? \d\d:\d\d:\d\d\S* +(?:\S+ +)?\S+:\d+\] (?P<message>.*)"),
    re.compile(r"\[\d{4}-\d\d-\d\d [\d:,.]+ (?P<level>[DIWEFC]) \d+ \d+\] (?:\(\w+\) )?(?P<message>.*)"),
    re.compile(
        r"(?:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\t)?(?P<level>DEBUG|INFO|WARN(?:ING)?|ERROR|CRITICAL)"
        r"(?: \S+:\d+ -- |: )(?P<message>.*)"
    ),
)
"""Log line formats of glog and Abseil, of Ray's processes, and of Ray's Python code (`WARNING: ...`)."""
_OF_ERRORS = "EFC"


def recent_error(log: Path, start: int = 0, silent_s: float = 0.0) -> str:
    """Returns the last error of a log, or "" if its worker logged it more than `RECENT_S` seconds before its last sign
    of life, which was `silent_s` seconds ago."""
    return last_error(log, start, time() - silent_s - RECENT_S)


def last_error(log: Path, start: int = 0, since_s: float = 0.0) -> str:
    """Returns the last warning, error or traceback line in a worker's log, or "". Reads the log from byte `start`, or
    the whole log if it has become shorter than `start`. Ignores lines from before `since_s` (seconds since 1970)."""
    try:
        with open_regular(log) as file:
            facts = os.fstat(file.fileno())
            size = facts.st_size
            file.seek(max(start if start <= size else 0, size - _READ_BYTES))
            lines = file.read(_READ_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    recent = _since(since_s, reversed([*_without_warnings(lines)]), facts.st_mtime)
    words = next(filter(None, map(_trouble, recent)), "")
    return line("last error", one_line(words))


def _since(since_s: float, newest_first: Iterator[str], at_s: float) -> Iterator[str]:
    """Yields lines that were written at `since_s` or later. `at_s` is the time of the newest line. A line without a
    time is as old as the line after it."""
    for text in newest_first:
        own_s = logged_at_s(text)
        at_s = at_s if own_s is None else own_s
        if at_s < since_s:
            return
        yield text


def _trouble(text: str) -> str:
    record = read_line(text)
    if record is not None:
        level, message = record
        return "" if level in _HARMLESS else message
    if found := next(filter(None, (form.match(text) for form in _OTHER_LOGGERS)), None):
        return found["message"].strip() if found["level"][0] in _OF_ERRORS else ""
    return "" if text.startswith((" ", "\t")) else text.strip()


def _without_warnings(lines: list[str]) -> Iterator[str]:
    at = 0
    while at < len(lines):
        if _PYTHON_WARNING.match(lines[at]):
            at = _end_of_warning(lines, at)
        else:
            yield lines[at]
            at += 1


def _end_of_warning(lines: list[str], start: int) -> int:
    for at in range(start + 1, min(start + 1 + _MOST_WARNING_LINES, len(lines))):
        if lines[at].startswith((" ", "\t")):
            return at + 1
        if read_line(lines[at]) is not None or lines[at] == _TRACEBACK:
            break
    return start + 1
