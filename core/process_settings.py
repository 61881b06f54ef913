"""Settings of this process: standard streams, open files, thread switching, garbage collection, thread priority."""

from __future__ import annotations

import codecs
import gc
import io
import os
import resource
import sys
from contextlib import suppress
from threading import get_native_id

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
_MANY_FILES = 1 << 16
_SERVERS = 2
"""Maximum number of servers in one process: one for the API, and one for the cluster's members."""
_SWITCH_INTERVAL_S = 0.0005
_LOWEST_PRIORITY = 19
_COLLECT_EVERY = 20_000
"""Number of allocations between two garbage collections. Python's default is 700."""


def open_standard_streams() -> None:
    """Opens /dev/null for each closed standard stream. Otherwise a file opened later could receive printed text."""
    for descriptor, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)
            if null != descriptor:
                os.close(null)
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def escape_what_locales_lack() -> None:
    """Lets standard output show escapes for characters that the locale's encoding lacks, instead of raising errors."""
    if isinstance(sys.stdout, io.TextIOWrapper) and codecs.lookup(sys.stdout.encoding).name != "utf-8":
        sys.stdout.reconfigure(errors="backslashreplace")


def allow_many_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MANY_FILES if hard == resource.RLIM_INFINITY else hard, hard))


def connections_of_server() -> int:
    """Returns a server's maximum number of connections. Servers leave a quarter of the file descriptors free."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (_MANY_FILES if files == resource.RLIM_INFINITY else files) * 3 // 4 // _SERVERS


def share_interpreter() -> None:
    """Lets a waiting thread get the GIL after 0.5 ms instead of 5 ms."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def collect_rarely() -> None:
    """Makes garbage collections rare. They take a tenth of the start-up time, and few objects form cycles."""
    gc.set_threshold(_COLLECT_EVERY)


def lower_priority(niceness: int) -> None:
    """Lowers the priority of the calling thread, and of threads that it starts later, if the system allows it."""
    if sys.platform == "linux" and niceness:
        with suppress(OSError):
            thread = os.PRIO_PROCESS, get_native_id()
            os.setpriority(*thread, min(os.getpriority(*thread) + niceness, _LOWEST_PRIORITY))
