from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llamaclust.core.bounds import LogLine, Size

_Line = LogLine(2000)
_MAX_LINES = 1000
_MAX_BYTES = 1 << 17  # Maximum size of a message's lines, encoded as UTF-8.


@dataclass(frozen=True, slots=True)
class GetLog:
    request_id: int = 0


@dataclass(frozen=True, slots=True)
class LogTail:
    lines: Annotated[tuple[Annotated[str, _Line], ...], Size(0, _MAX_LINES)]
    before: int  # Number of earlier lines, which are not in the message.
    request_id: int = 0

    @classmethod
    def bounded(cls, lines: tuple[str, ...], before: int, request_id: int = 0) -> LogTail:
        kept: list[str] = []
        left = _MAX_BYTES
        for line in map(_Line.fit, reversed(lines[-_MAX_LINES:])):
            left -= len(line.encode())
            if left < 0:
                break
            kept.append(line)
        return cls(tuple(kept[::-1]), before + len(lines) - len(kept), request_id)
