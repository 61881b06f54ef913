"""Ties a process to the one that started it: when that is gone, however it went, this one is killed too (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def set_parent_death_signal(parent_pid: int) -> None:
    """Has the kernel kill this process, native calls or not, when its parent ends; ends it now if it has ended.

    The kernel means the thread that started this process: the starter does so from a thread that lives as long as it.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        raise SystemExit(f"the process that started this worker ({parent_pid}) is gone")
