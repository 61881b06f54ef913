"""Faults within a worker's process: its steps fail, or its stages pass nothing on, for a few seconds after a signal.

Workers have them only where they are started with `PRELOAD` in PYTHONPATH.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

PRELOAD = Path(__file__).parent / "preload"
FAILING, MUTE = signal.SIGUSR1, signal.SIGUSR2
FAILING_S, MUTE_S = 2.0, 6.0
"""Several failures; longer than a step may take before its worker counts as lost."""


Active = Callable[[], bool]


def break_steps(is_active: Active) -> None:
    """Steps of this process's stages fail meanwhile."""
    from llamaclust.worker.stage.loop import StageLoop  # not where faults are only begun

    run_layers = StageLoop._run_layers

    def fails(loop: StageLoop, *given: Any) -> Any:
        if is_active():
            raise RuntimeError("a fault of `llamaclust chaos`")
        return run_layers(loop, *given)

    StageLoop._run_layers = fails  # type: ignore[method-assign, assignment]


def silence(is_active: Active) -> None:
    """Stages of this process pass nothing on meanwhile."""
    from llamaclust.worker.stage.loop import StageLoop

    send_answers = StageLoop._send_answers

    async def sends_nothing(loop: StageLoop, *given: Any) -> None:
        if not is_active():
            await send_answers(loop, *given)

    StageLoop._send_answers = sends_nothing  # type: ignore[method-assign, assignment]


def install() -> None:
    """Each fault begins at its signal and ends by itself, whatever becomes of the program that began it."""
    _at_signal(FAILING, FAILING_S, break_steps)
    _at_signal(MUTE, MUTE_S, silence)


def _at_signal(number: signal.Signals, lasts_s: float, fault: Callable[[Active], None]) -> None:
    until_s = 0.0

    def begin(*_: object) -> None:
        nonlocal until_s
        until_s = monotonic() + lasts_s

    fault(lambda: monotonic() < until_s)
    signal.signal(number, begin)
