"""Faults within a worker's process: its steps fail, or its stages pass nothing on, for a few seconds after a signal.

Workers have them only where they are started with `PRELOAD` in PYTHONPATH.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamaclust.worker.stage.loop import StageLoop

PRELOAD = Path(__file__).parent / "preload"
FAILING, MUTE = signal.SIGUSR1, signal.SIGUSR2
FAILING_S, MUTE_S = 2.0, 6.0
"""Several failures; longer than a step may take before its worker counts as lost."""


class WorkerFaults:
    """Ends each fault by itself, whatever becomes of the program that began it."""

    def __init__(self) -> None:
        self._failing_until_s = self._mute_until_s = 0.0

    def install(self) -> None:
        from llamaclust.worker.stage.loop import StageLoop  # not where faults are only begun

        run_layers, send_answers = StageLoop._run_layers, StageLoop._send_answers
        StageLoop._run_layers = self._failing(run_layers)  # type: ignore[method-assign]
        StageLoop._send_answers = self._mute(send_answers)  # type: ignore[method-assign]
        signal.signal(FAILING, lambda *_: self._begin_failing())
        signal.signal(MUTE, lambda *_: self._begin_mute())

    def _begin_failing(self) -> None:
        self._failing_until_s = monotonic() + FAILING_S

    def _begin_mute(self) -> None:
        self._mute_until_s = monotonic() + MUTE_S

    def _failing(self, run_layers: Callable[..., Any]) -> Callable[..., Any]:
        def run(loop: StageLoop, *given: Any) -> Any:
            if monotonic() < self._failing_until_s:
                raise RuntimeError("a fault of `llamaclust chaos`")
            return run_layers(loop, *given)

        return run

    def _mute(self, send_answers: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Coroutine[Any, Any, None]]:
        async def send(loop: StageLoop, *given: Any) -> None:
            if monotonic() >= self._mute_until_s:
                await send_answers(loop, *given)

        return send
