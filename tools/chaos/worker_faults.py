"""Faults in a worker process. A signal starts a fault of a few seconds: every step fails, or stages send no results. A
worker handles these signals only if it starts with `PRELOAD` in PYTHONPATH."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

PRELOAD = Path(__file__).parent / "preload"
FAILING, MUTE = signal.SIGUSR1, signal.SIGUSR2
FAILING_S, MUTE_S = 2.0, 6.0
"""Durations in seconds. Several steps fail in FAILING_S. A worker that sends nothing for MUTE_S counts as lost."""
_LOOK_S = 0.01

Active = Callable[[], bool]


def break_steps(is_active: Active) -> None:
    """Makes all steps of a worker fail while `is_active()` returns True."""
    # The process that only sends signals must not import the worker.
    from llamaclust.worker.stage.following import FollowingStage
    from llamaclust.worker.stage.loop import StageLoop

    run_layers, follow = StageLoop._run_layers, FollowingStage._step

    def fails(loop: StageLoop, *given: Any) -> Any:
        if is_active():
            raise RuntimeError("`llamaclust chaos` injected this error")
        return run_layers(loop, *given)

    def fails_to_follow(stage: FollowingStage, data: bytes) -> None:
        if is_active():
            raise RuntimeError("`llamaclust chaos` injected this error")
        follow(stage, data)

    StageLoop._run_layers = fails  # type: ignore[method-assign, assignment]
    FollowingStage._step = fails_to_follow  # type: ignore[method-assign, assignment]


def silence(is_active: Active) -> None:
    """Stops stages from sending results while `is_active()` is True. Followers in a group delay their steps instead."""
    from llamaclust.worker.stage.following import FollowingStage
    from llamaclust.worker.stage.loop import StageLoop

    send_answers, follow = StageLoop._send_answers, FollowingStage._step

    async def sends_nothing(loop: StageLoop, *given: Any) -> None:
        if not is_active():
            await send_answers(loop, *given)

    def gets_no_further(stage: FollowingStage, data: bytes) -> None:
        while is_active():
            sleep(_LOOK_S)
        follow(stage, data)

    StageLoop._send_answers = sends_nothing  # type: ignore[method-assign, assignment]
    FollowingStage._step = gets_no_further  # type: ignore[method-assign, assignment]


def install() -> None:
    _at_signal(FAILING, FAILING_S, break_steps)
    _at_signal(MUTE, MUTE_S, silence)


def _at_signal(number: signal.Signals, lasts_s: float, fault: Callable[[Active], None]) -> None:
    until_s = 0.0

    def begin(*_: object) -> None:
        nonlocal until_s
        until_s = monotonic() + lasts_s

    fault(lambda: monotonic() < until_s)
    signal.signal(number, begin)
