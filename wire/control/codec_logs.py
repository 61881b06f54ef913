"""Control messages about workers' logs as bytes and back: the last lines, bounded on both sides."""

from __future__ import annotations

from collections.abc import Sequence

from llamaclust.core.errors import ProtocolError
from llamaclust.proto import control_pb2 as proto
from llamaclust.wire.bounds import bounded
from llamaclust.wire.control.messages import GetLog, LogTail

MAX_LINES = 1000
MAX_LINE = 2000
"""Characters."""
MAX_LOG_BYTES = 1 << 17
"""Of all lines as UTF-8: what else a control message has beside them is little."""


def tell_out(message: GetLog) -> proto.TellLog:
    return proto.TellLog(number=message.number)


def tell_in(message: proto.TellLog) -> GetLog:
    return GetLog(message.number)


def told_out(message: LogTail) -> proto.LogTold:
    lines = _bounded(message.lines)
    before = message.before + len(message.lines) - len(lines)
    return proto.LogTold(number=message.number, lines=lines, before=before)


def told_in(message: proto.LogTold) -> LogTail:
    bounded("lines of a log", len(message.lines), 0, MAX_LINES)
    if any(len(line) > MAX_LINE for line in message.lines):
        raise ProtocolError(f"a line of a log has more than {MAX_LINE} characters")
    return LogTail(tuple(map(_printable, message.lines)), message.before, message.number)


def _bounded(lines: Sequence[str]) -> list[str]:
    """The last ones that may travel, in what a line may hold."""
    kept: list[str] = []
    left = MAX_LOG_BYTES
    for line in map(_fit, reversed(lines[-MAX_LINES:])):
        left -= len(line.encode())
        if left < 0:
            break
        kept.append(line)
    return kept[::-1]


def _fit(line: str) -> str:
    text = line.encode("utf-8", "backslashreplace").decode()  # lone surrogates do not travel
    return text if len(text) <= MAX_LINE else text[: MAX_LINE - 3] + "..."


def _printable(line: str) -> str:
    """Without what could move a terminal's cursor; indents stay."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in line)
