"""What the journal's file must hold: the lines of requests that have not ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

from llamaclust.cluster.state.journal_records import (
    Admission,
    ChoiceKey,
    OpenRequest,
    admission_line,
    answer_line,
    end_line,
    restores_line,
    sent_line,
)
from llamaclust.core.sampling import RowResult

_SENT_BYTES = 16 << 20
"""Of requests whose replies were sent; the oldest give way."""


class JournalContents:
    """Each change returns the lines to be written; none where it is of a request that has ended."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._lines: dict[str, list[bytes]] = {}
        self._sent: dict[str, float] = {}  # when their whole replies had been sent; the oldest first
        self._sent_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._lines)

    @property
    def data(self) -> bytes:
        return b"".join(line for lines in self._lines.values() for line in lines)

    @property
    def oldest_sent_s(self) -> float | None:
        return next(iter(self._sent.values()), None)

    def restore(self, request: OpenRequest, now_s: float) -> None:
        """Adds the request of an earlier coordinator."""
        request_id = request.admission.id
        self.admit(request.admission)
        for choice, rows in request.answered.items():
            self.answer(request_id, choice, 0, rows)
        if request.restores:
            self.restored(request_id, request.restores)
        if request.is_sent:
            self.sent(request_id, now_s)

    def admit(self, admission: Admission) -> bytes:
        line = admission_line(admission)
        self._lines[admission.id] = [line]
        self.size_bytes += len(line)
        return line

    def answer(self, request_id: str, choice: ChoiceKey, start: int, rows: Sequence[RowResult]) -> bytes:
        return self._add(request_id, answer_line(request_id, choice, start, rows))

    def restored(self, request_id: str, times: int) -> bytes:
        return self._add(request_id, restores_line(request_id, times))

    def sent(self, request_id: str, now_s: float) -> bytes:
        """The oldest of these end where they are many."""
        if request_id in self._sent:
            return b""
        line = self._add(request_id, sent_line(request_id))
        if request_id in self._lines:
            self._sent[request_id] = now_s
            self._sent_bytes += _size(self._lines[request_id])
        excess = []
        while self._sent_bytes > _SENT_BYTES:
            excess.append(next(iter(self._sent)))
            self._remove(excess[-1])
        return line + end_line(excess) if excess else line

    def completed(self, request_id: str) -> bytes:
        """As if it had been sent, but no time ends it."""
        return self._add(request_id, sent_line(request_id))

    def end(self, request_id: str) -> bytes:
        return end_line([request_id]) if self._remove(request_id) else b""

    def end_sent(self, until_s: float) -> bytes:
        """Those that were sent until then."""
        ended = list(takewhile(lambda request_id: self._sent[request_id] <= until_s, self._sent))
        for request_id in ended:
            self._remove(request_id)
        return end_line(ended) if ended else b""

    def _remove(self, request_id: str) -> bool:
        """False where it has ended."""
        lines = self._lines.pop(request_id, None)
        if lines is None:
            return False
        size_bytes = _size(lines)
        self.size_bytes -= size_bytes
        if self._sent.pop(request_id, None) is not None:
            self._sent_bytes -= size_bytes
        return True

    def _add(self, request_id: str, line: bytes) -> bytes:
        lines = self._lines.get(request_id)
        if lines is None:
            return b""
        lines.append(line)
        self.size_bytes += len(line)
        if request_id in self._sent:
            self._sent_bytes += len(line)
        return line


def _size(lines: Iterable[bytes]) -> int:
    return sum(map(len, lines))
