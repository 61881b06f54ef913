"""What Ctrl-C does while nothing has begun that would have to be tidied up: it ends the process without a word."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


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
