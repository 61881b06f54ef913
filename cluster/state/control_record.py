"""Records a coordinator's term, drained workers and context lengths on disk for the next coordinator."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from llamaclust.cluster.state.directory import read_as, write_private
from llamaclust.cluster.state.disk_thread import DiskThread
from llamaclust.core.epochs import MAX_TERM, epoch_number
from llamaclust.core.errors import LlamaclustError, SupersededError
from llamaclust.core.sampler.bounds import MAX_CONTEXT_TOKENS

_MAX_EXCEEDED = MAX_TERM >> 1
"""Limit for terms that workers report. A larger term counts as this limit, so that no worker can use up all terms."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Written:
    term: Annotated[int, Field(ge=0, lt=MAX_TERM)]
    drained: frozenset[str]  # Names of drained workers.
    # Context lengths that were chosen at the start, by model id.
    contexts: dict[str, Annotated[int, Field(ge=1, le=MAX_CONTEXT_TOKENS)]] = field(default_factory=dict)


_WRITTEN = TypeAdapter(_Written)


@dataclass(slots=True)
class ControlRecord:
    """A coordinator's term, drained workers and context lengths. Changes are written to `path`, unless it is None.
    Methods raise SupersededError if a newer coordinator has written the file."""

    path: Path | None = None
    term: int = 0
    drained: frozenset[str] = frozenset()
    contexts: Mapping[str, int] = field(default_factory=dict)  # Context lengths by model id.
    _epochs: int = field(default=0, init=False)
    _written_term: int = field(default=0, init=False)
    _written: _Written | None = field(default=None, init=False)
    _disk: DiskThread = field(default_factory=partial(DiskThread, "control record"), init=False, compare=False)
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock, init=False, compare=False)

    @classmethod
    def begin(cls, path: Path) -> ControlRecord:
        """Begins a term that is larger than the last coordinator's term. Raises LlamaclustError if writing fails."""
        last = _Written(0, frozenset())
        try:
            last = read_as(path, _WRITTEN)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            _log.warning("%s: cannot be read: %s; no worker counts as drained", path, error)
        if last.term + 1 >= MAX_TERM:
            what = f"{path}: term {last.term} is the largest term"
            raise LlamaclustError(f"{what}; stop the coordinator and remove this file")
        record = cls(path, last.term + 1, last.drained, last.contexts)
        record._written_term = last.term
        record._write(_Written(record.term, record.drained, {**record.contexts}))
        return record

    def next_epoch(self) -> int:
        self._epochs += 1
        return epoch_number(self.term, self._epochs)

    async def admits(self, seen_term: int) -> bool:
        """Returns False if a worker has seen a larger term, which means that a newer coordinator exists."""
        seen_term = min(seen_term, _MAX_EXCEEDED)
        # The record of the last coordinator was lost. Before its first epoch, this coordinator can take a larger term.
        if seen_term and seen_term >= self.term and not self._epochs:
            self.term = seen_term + 1
        if (term := max(self.term, seen_term)) > self._written_term:
            await self._save(term)
        return seen_term <= self.term

    async def drain(self, names: frozenset[str]) -> None:
        self.drained = names
        await self._save_changes()

    async def keep_contexts(self, contexts: Mapping[str, int]) -> None:
        self.contexts = contexts
        await self._save_changes()

    async def _save_changes(self) -> None:
        written = self._written
        if written is None or (written.drained, written.contexts) != (self.drained, self.contexts):
            await self._save(self._written_term)

    def newer_term(self) -> int:
        try:
            term = 0 if self.path is None else read_as(self.path, _WRITTEN).term
        except (OSError, ValueError):
            return 0
        return term if term > self._written_term else 0

    async def _save(self, term: int) -> None:
        async with self._writing:
            written = _Written(max(term, self._written_term), self.drained, {**self.contexts})
            await self._disk.write(self.path, partial(self._write, written))

    def _write(self, written: _Written) -> None:
        if newer := self.newer_term():
            raise SupersededError(f"{self.path}: a newer coordinator (term {newer}) owns the cluster")
        # This process must not mistake its own term in the file for a newer coordinator's, even if writing fails.
        before, self._written_term = self._written_term, written.term
        try:
            if self.path is not None:
                write_private(self.path, _WRITTEN.dump_json(written).decode())
        except LlamaclustError:
            self._written_term = before
            raise
        self._written = written
