"""Settings of a process that its main function makes once: standard streams, open files, shares of Python's
interpreter and its garbage collection."""

from __future__ import annotations

import gc
import os
import resource
import sys

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
_MANY_FILES = 1 << 16
_SERVERS = 2
"""Servers that a process may have at once: the API's and the members'."""
_SWITCH_INTERVAL_S = 0.0005
_COLLECT_EVERY = 20_000
"""Objects between two looks for garbage, 700 by default."""


def open_standard_streams() -> None:
    """Puts /dev/null in the place of each closed one. Otherwise the next file opened gets its descriptor, and what is
    printed is written into that file."""
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
    """Raises this process's limit of open files to the hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MANY_FILES if hard == resource.RLIM_INFINITY else hard, hard))


def connections_of_server() -> int:
    """The bound on the connections of each server of this process: all of them together leave a quarter of the files
    that it may have open to models, pipes and connections that it opens itself."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (_MANY_FILES if files == resource.RLIM_INFINITY else files) * 3 // 4 // _SERVERS


def share_interpreter() -> None:
    """A thread that waits for the interpreter gets it in half a millisecond, not in Python's usual 5: the event loop
    beside threads that render or parse, the compute thread after a native call."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def collect_rarely() -> None:
    """Imports, steps and replies make many objects, and few in cycles: looking for these takes a tenth of a start."""
    gc.set_threshold(_COLLECT_EVERY)
