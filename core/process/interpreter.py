"""Shares of Python's interpreter, and its garbage collection."""

from __future__ import annotations

import gc
import sys

_SWITCH_INTERVAL_S = 0.0005
_COLLECT_EVERY = 20_000
"""Objects between two looks for garbage, 700 by default."""


def share_interpreter() -> None:
    """A thread that waits for the interpreter gets it in half a millisecond, not in Python's usual 5: the event loop
    beside threads that render or parse, the compute thread after a native call."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def collect_rarely() -> None:
    """Imports, steps and replies make many objects, and few in cycles: looking for these takes a tenth of a start."""
    gc.set_threshold(_COLLECT_EVERY)
