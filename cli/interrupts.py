"""Handles Ctrl-C and other signals for commands. A running cluster handles its signals itself."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import NoReturn

from llamaclust.cli.terminal import print_error
from llamaclust.core.errors import LlamaclustError

_REPEAT_S = 0.01
"""Seconds until a signal handler is called again if Python discarded its exception."""


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Lets Ctrl-C end the process without KeyboardInterrupt, for example while modules are imported."""
    # A process in a shell's background ignores SIGINT, and must go on doing so.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_once(code: int) -> NoReturn:
    """Ends the process without the interpreter's shutdown, which would wait for computing threads or interrupt them."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


Held = Callable[[], AbstractContextManager[None]]
"""Returns a context manager for a `with` block. A signal that arrives in the block ends the process after the block."""


@contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Calls `handle` for the signal that arrives first, and ignores later signals."""
    handled = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    received: list[int] = []
    usual_hook = sys.unraisablehook

    def first(number: int, frame: FrameType | None) -> None:
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        received.append(number)
        handle(number, frame)

    def discarded(args: sys.UnraisableHookArgs) -> None:
        if not received or not isinstance(args.exc_value, SystemExit | KeyboardInterrupt):
            usual_hook(args)
            return
        # Python has discarded the handler's exception, because a destructor was running.
        signal.signal(signal.SIGALRM, lambda _, frame: handle(received[0], frame))
        signal.setitimer(signal.ITIMER_REAL, _REPEAT_S)

    sys.unraisablehook = discarded
    for number in handled:
        signal.signal(number, first)
    try:
        yield
    finally:
        sys.unraisablehook = usual_hook
        # If a signal was received, the process ends, and a second signal must not change its exit code.
        if not received:
            for number in handled:
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def exits_on_signals(*numbers: signal.Signals) -> Iterator[Held]:
    """Turns the signal that arrives first into SystemExit, so that cleanup runs. The exit code is 128 plus the
    signal's number, as in a shell. Yields a function `held`. A block `with held():` delays signals until its end."""
    holds = False
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
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
        if received:
            raise SystemExit(128 + received[0])

    with _handled(numbers, leave):
        yield held


@contextmanager
def signals_as_interrupts(*numbers: signal.Signals) -> Iterator[None]:
    """Treats the signal that arrives first as Ctrl-C, so that cleanup runs. The process then ends with 128 plus the
    signal's number, as in a shell."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        usual = signal.getsignal(signal.SIGINT)
        if not callable(usual):  # SIGINT is ignored, because the process runs in a shell's background.
            raise KeyboardInterrupt
        usual(signal.SIGINT, frame)

    with _handled(numbers, interrupt):
        try:
            yield
        except KeyboardInterrupt:
            if received:
                end_at_once(128 + received[0])
            raise


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Wraps a script's main function: prints LlamaclustError and OSError in one line, and ends cleanly on signals."""
    try:
        with signals_as_interrupts(signal.SIGTERM, signal.SIGHUP):
            yield
    except KeyboardInterrupt:
        end_at_once(128 + signal.SIGINT)
    except LlamaclustError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except OSError as error:
        print_error(error)
        sys.exit(1)


def ends_workers_cleanly(workers: int) -> AbstractContextManager[None]:
    return signals_as_interrupts(signal.SIGTERM, signal.SIGHUP) if workers > 1 else nullcontext()
