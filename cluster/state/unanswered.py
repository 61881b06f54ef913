"""What is said of requests that a coordinator left unanswered, at its end and at the next start: one line, or ""."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamaclust.cluster.state.instants import Instant
from llamaclust.cluster.state.journal_records import OpenRequest, read_journal


def left_unanswered(journal: Path) -> str:
    """Of a coordinator that has ended. A journal that cannot be read is reported by the next start."""
    try:
        number = _unanswered(read_journal(journal, Instant.now()))
    except OSError:
        return ""
    return f"{_requests(number)} computed again at the next start" if number else ""


def found_unanswered(requests: Sequence[OpenRequest], restored: Sequence[OpenRequest]) -> str:
    """Of the requests that a start has found, and those of them that it answers."""
    number, dropped = _unanswered(restored), _unanswered(requests) - _unanswered(restored)
    lines = [f"{_requests(number)} computed again"] if number else []
    if dropped:
        lines.append(f"{_requests(dropped)} dropped, since the model, its settings or the version have changed")
    return "; ".join(lines)


def _unanswered(requests: Sequence[OpenRequest]) -> int:
    return sum(not request.is_sent for request in requests)


def _requests(number: int) -> str:
    return "1 unanswered request is" if number == 1 else f"{number} unanswered requests are"
