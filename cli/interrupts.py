"""What Ctrl-C and other signals do to a command before, and beside, what a running cluster makes of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType


@contextmanager
def ends_at_once() -> Iterator[None]:
    """For imports and the like: Ctrl-C ends the process, where the exception that it usually is would be a traceback,
    or be lost in a library that catches everything."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as in a shell's background
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


Held = Callable[[], AbstractContextManager[None]]
"""In this context a signal waits for its end."""


@contextmanager
def exits_when_told(*numbers: signal.Signals) -> Iterator[Held]:
    """For what has to be tidied up: the first of these signals is SystemExit with the code that a shell shows for it,
    later ones are not heard. One that is ignored, as nohup has it, stays so."""
    heard = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    holds = False
    told: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        for one in heard:
            signal.signal(one, signal.SIG_IGN)
        told.append(number)
        if not holds:
            raise SystemExit(128 + number)

    @contextmanager
    def held() -> Iterator[None]:
        nonlocal holds
        holds = True
        try:
            yield
        finally:
            holds = False
        if told:
            raise SystemExit(128 + told[0])

    for number in heard:
        signal.signal(number, leave)
    try:
        yield held
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)
