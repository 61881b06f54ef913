"""Sampled tokens on their way into the journal, and whether a restored request gets further than before."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from time import monotonic

from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import ChoiceKey
from llamaclust.core.sampling import RowResult

_RECORDED_ROWS = 64
_RECORDED_S = 1.0
"""The oldest row that is not recorded waits no longer, once another one comes: of slow streams, too, a successor
computes little again."""


class Restoration:
    """The computation of a request that an earlier coordinator admitted: it has progressed once a token was added.
    `adapters`: marks of those that clients had loaded and it used."""

    def __init__(self, journal: Journal, request_id: str, adapters: Sequence[str] = ()) -> None:
        self.adapters = frozenset(adapters)
        self._journal = journal
        self._id = request_id
        self._has_progressed = asyncio.Event()

    def sampled(self, prompt: int, chunk: TextChunk) -> None:
        """A chunk of an answer of which nothing was known before."""
        if chunk.rows:
            self.progress()

    def progress(self) -> None:
        """A token came that was not known before."""
        if not self._has_progressed.is_set():
            self._has_progressed.set()
            self._journal.progressed(self._id)

    async def progressed(self) -> None:
        await self._has_progressed.wait()


class Recording:
    """The tokens of a request's choices, recorded some at a time: of a restored request the first ones sooner, so that
    it gets further in a coordinator's short life. A subscriber of its log."""

    def __init__(
        self, journal: Journal, request_id: str, known: Mapping[ChoiceKey, int], restoration: Restoration | None
    ) -> None:
        """`known`: how many tokens of each choice are recorded already."""
        self._journal = journal
        self._id = request_id
        self._restoration = restoration
        self._starts = dict(known)
        self._skipped = dict(known)
        self._most = _RECORDED_ROWS if restoration is None else 1
        self._rows: dict[ChoiceKey, list[RowResult]] = {}
        self._oldest_s = 0.0  # of these rows

    def add(self, prompt: int, chunk: TextChunk) -> None:
        """The next tokens of a choice, from its first one on."""
        choice, new = (prompt, chunk.index), chunk.rows
        if self._skipped.get(choice):
            new = new[self._skipped[choice] :]
            self._skipped[choice] -= len(chunk.rows) - len(new)
        if not new:
            return
        if self._restoration is not None:
            self._restoration.progress()
        now_s = monotonic()
        if not self._rows:
            self._oldest_s = now_s
        rows = self._rows.setdefault(choice, [])
        rows += new
        if len(rows) >= self._most or now_s - self._oldest_s >= _RECORDED_S:
            self._most = min(2 * self._most, _RECORDED_ROWS)
            self._write()

    def _write(self) -> None:
        for choice, rows in self._rows.items():
            start = self._starts.get(choice, 0)
            self._journal.answer(self._id, choice, start, rows)
            self._starts[choice] = start + len(rows)
        self._rows.clear()
