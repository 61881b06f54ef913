"""Writes the tokens of a request to the journal, several tokens per record."""

from __future__ import annotations

import asyncio
from collections import Counter
from time import monotonic

from llamaclust.cluster.front.text.answer import TextChunk
from llamaclust.cluster.front.text.answer_log import AnswerLog
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import ChoiceKey, RequestContext
from llamaclust.core.sampler.results import RowResult

_RECORDED_ROWS = 64
_RECORDED_S = 1.0
"""Maximum seconds that a token waits to share a record with later tokens. A crash loses only the waiting tokens."""


class Recording:
    """Writes the tokens of one request to the journal."""

    def __init__(self, journal: Journal, context: RequestContext, progressed: asyncio.Event) -> None:
        """`progressed` is set when a restored request gets a token that no earlier coordinator recorded."""
        self._journal = journal
        self._id = context.id
        self._is_restored = context.is_restored
        self._progressed = progressed
        self._known = {choice: len(rows) for choice, rows in context.answered.items()}
        self._came: Counter[ChoiceKey] = Counter()
        self._most = 1 if context.is_restored else _RECORDED_ROWS
        self._rows: dict[ChoiceKey, list[RowResult]] = {}
        self._oldest_s = 0.0  # Arrival time of the oldest token in `_rows`.

    def follow(self, log: AnswerLog) -> None:
        """Records all tokens that are added to the log from now on."""
        needs_more = any(
            each.top_logprobs or each.score_from is not None or each.params.needs_state for each in log.generations
        )
        # Other answers cannot be restored from tokens alone.
        if not needs_more:
            log.subscribe(self.add)
        elif self._is_restored:
            log.subscribe(self.progress)

    def add(self, prompt: int, chunk: TextChunk) -> None:
        """Records the next tokens of a choice. The caller must also pass tokens recorded earlier, which are skipped."""
        choice, new = (prompt, chunk.index), chunk.rows
        came = self._came[choice]
        self._came[choice] = came + len(new)
        if self._known and (known := self._known.get(choice, 0)) > came:
            new = new[known - came :]
        if not new:
            return
        if self._is_restored:
            self.progress(prompt, chunk)
        now_s = monotonic()
        if not self._rows:
            self._oldest_s = now_s
        rows = self._rows.setdefault(choice, [])
        rows += new
        if len(rows) >= self._most or now_s - self._oldest_s >= _RECORDED_S:
            self._most = min(2 * self._most, _RECORDED_ROWS)
            self._write()

    def progress(self, _: int, chunk: TextChunk) -> None:
        if chunk.rows and not self._progressed.is_set():
            self._progressed.set()
            self._journal.progressed(self._id)

    def _write(self) -> None:
        for choice, rows in self._rows.items():
            self._journal.answer(self._id, choice, self._came[choice] - len(rows), rows)
        self._rows.clear()
