from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llamaclust.core.bounds import LogLine, Size

_Line = LogLine(2000)
_MAX_LINES = 1000
_MAX_BYTES = 1 << 17  # of all lines as UTF-8: little else is in such a message


@dataclass(frozen=True, slots=True)
class GetLog:
    request_id: int = 0


@dataclass(frozen=True, slots=True)
class LogTail:
    lines: Annotated[tuple[Annotated[str, _Line], ...], Size(0, _MAX_LINES)]
    before: int  # number of lines before them
    request_id: int = 0

    @classmethod
    def bounded(cls, lines: tuple[str, ...], before: int, request_id: int = 0) -> LogTail:
        """Keeps as many of the last lines as one message can hold."""
        kept: list[str] = []
        left = _MAX_BYTES
        for line in map(_Line.fit, reversed(lines[-_MAX_LINES:])):
            left -= len(line.encode())
            if left < 0:
                break
            kept.append(line)
        return cls(tuple(kept[::-1]), before + len(lines) - len(kept), request_id)
