"""Process-wide settings that a main function makes once: standard streams, open files, thread switching, garbage
collection."""

from __future__ import annotations

import gc
import os
import resource
import sys

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
_MANY_FILES = 1 << 16
_SERVERS = 2
"""The most servers of a process: the API's and the members'."""
_SWITCH_INTERVAL_S = 0.0005
_COLLECT_EVERY = 20_000
"""Allocations between two garbage collections; Python's default is 700."""


def open_standard_streams() -> None:
    """Opens /dev/null for each closed stream. Otherwise the next opened file gets its descriptor, and printed text is
    written into that file."""
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


def allow_many_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MANY_FILES if hard == resource.RLIM_INFINITY else hard, hard))


def connections_of_server() -> int:
    """Returns the bound on connections of each server: together they leave a quarter of the process's files to models,
    pipes and outgoing connections."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (_MANY_FILES if files == resource.RLIM_INFINITY else files) * 3 // 4 // _SERVERS


def share_interpreter() -> None:
    """Lets a waiting thread have the interpreter within 0.5 ms, not Python's 5: the event loop beside threads that
    parse, the compute thread after a native call."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def collect_rarely() -> None:
    """Collects rarely: few of the many objects are in cycles, and collection takes a tenth of a start."""
    gc.set_threshold(_COLLECT_EVERY)
