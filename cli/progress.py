"""How a download or other long work goes, on standard error: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llamaclust.core.sizes import MIB

if TYPE_CHECKING:
    from rich.progress import TaskID

    from llamaclust.tools.hub.download import Progress as Told

_STEPS = 10
_LINE_S = 10.0


@contextmanager
def shown_progress(counts_bytes: bool = True) -> Iterator[Told]:
    """What to tell of it; nothing is shown before something is told."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(counts_bytes=counts_bytes)
        return
    done: list[ProgressColumn] = (
        [DownloadColumn(binary_units=True), TransferSpeedColumn()] if counts_bytes else [MofNCompleteColumn()]
    )
    columns = (TextColumn("{task.description}"), BarColumn(), *done, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done_bytes: int, total_bytes: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total_bytes)
            bar.update(tasks[what], completed=done_bytes, total=total_bytes)

        yield show


class ProgressLines:
    """A line for each new thing that is done, then one for every tenth of it, and one where ten seconds passed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, counts_bytes: bool = True) -> None:
        self._clock = clock
        self._counts_bytes = counts_bytes
        self._told: tuple[str, int] | None = None
        self._told_at = 0.0

    def __call__(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        step = (what, _STEPS * done_bytes // total_bytes if total_bytes else 0)
        now = self._clock()
        if step == self._told and now - self._told_at < _LINE_S:
            return
        self._told, self._told_at = step, now
        line = _line(what, done_bytes, total_bytes) if self._counts_bytes else f"{what}: {done_bytes} of {total_bytes}"
        print(line, file=sys.stderr)


def _line(what: str, done_bytes: int, total_bytes: int | None) -> str:
    if total_bytes:
        return f"{what}: {done_bytes / MIB:.1f} of {total_bytes / MIB:.1f} MiB"
    return f"{what}: {done_bytes / MIB:.1f} MiB" if done_bytes else what
