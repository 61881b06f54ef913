"""What a person sees while a cluster starts: a progress bar a worker, the plan, where the API is and how to try it."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from llamaclust.cluster.events import Event, PlanMade, Ready, StartFailed, WorkerLoading

_MIB = 1 << 20


class StartView:
    """Draws the events of a start on stderr; a context manager that leaves the terminal as it was.

    Where stderr is no terminal each worker gets a line instead of a bar.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        match event:
            case WorkerLoading():
                self._load(event)
            case PlanMade():
                self._console.print("\n".join(event.lines), markup=False, soft_wrap=True)
            case Ready():
                self._progress.stop()
                print(ready_text(event), file=sys.stderr)
            case StartFailed():
                self._progress.stop()

    def _load(self, event: WorkerLoading) -> None:
        bar = self._bars.get(event.worker)
        if bar is None:
            label = f"worker {event.worker}, layers {event.start}-{event.end - 1}"
            if self._progress.disable:
                print(f"{label}: loading {event.total_bytes / _MIB:.1f} MiB", file=sys.stderr)
            self._progress.start()
            bar = self._bars[event.worker] = self._progress.add_task(label, total=event.total_bytes)
        self._progress.update(bar, completed=event.done_bytes, total=event.total_bytes)


def ready_text(ready: Ready) -> str:
    """How to try a cluster that is ready."""
    return (
        f"\n{ready.name} is ready: {ready.model} at {ready.api}\n"
        f'  llamaclust chat                                 or   llamaclust generate "Once upon a time"\n'
        f"  OpenAI clients: base_url={ready.api}/v1         status: llamaclust status --cluster {ready.name}\n"
    )
