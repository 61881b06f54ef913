"""A membership that ends for a change of this machine's address has ended whole before the next one begins."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llamaclust.core.errors import WorkerError
from llamaclust.worker.static import _served


class _Parts:
    """A member whose service takes some turns of the event loop to end, and an address that may change."""

    def __init__(self, turns: int, ends: WorkerError | str, changes: WorkerError | None) -> None:
        self.turns = turns
        self.ends = ends
        self.changes = changes
        self.is_serving = self.is_watching = True

    async def serve(self) -> str:
        try:
            if self.changes is not None:
                await asyncio.Event().wait()
            if isinstance(self.ends, WorkerError):
                raise self.ends
            return self.ends
        finally:
            for _ in range(self.turns):
                await asyncio.sleep(0)
            self.is_serving = False

    async def changed(self) -> WorkerError:
        try:
            if self.changes is None:
                await asyncio.Event().wait()
            return self.changes or WorkerError("never")
        finally:
            for _ in range(self.turns):
                await asyncio.sleep(0)
            self.is_watching = False


@pytest.mark.parametrize("turns", [0, 1, 5])
@pytest.mark.parametrize(
    ("ends", "changes"),
    [("stopped", None), (WorkerError("it is lost"), None), ("stopped", WorkerError("this machine's address is new"))],
    ids=["end", "loss", "change"],
)
async def test_nothing_of_a_membership_runs_on(
    turns: int, ends: WorkerError | str, changes: WorkerError | None
) -> None:
    parts: Any = _Parts(turns, ends, changes)
    error = changes or ends
    async with asyncio.timeout(20):
        if isinstance(error, WorkerError):
            with pytest.raises(WorkerError, match=str(error)):
                await _served(parts, parts)
        else:
            assert await _served(parts, parts) == ends
    assert not parts.is_serving and not parts.is_watching
