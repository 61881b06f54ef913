"""How threads of one process share Python's interpreter."""

from __future__ import annotations

import sys

_SWITCH_INTERVAL_S = 0.0005


def share_interpreter() -> None:
    """A thread that waits for the interpreter gets it in half a millisecond, not in Python's usual 5: the event loop
    beside threads that render or parse, the compute thread after a native call."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
