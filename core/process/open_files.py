"""How many files a process may have open, and how many of them connections take."""

from __future__ import annotations

import resource

_MANY_FILES = 1 << 16
_SERVERS = 2
"""Servers that a process may have at once: the API's and the members'."""


def allow_many_files() -> None:
    """Raises this process's limit of open files to the hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MANY_FILES if hard == resource.RLIM_INFINITY else hard, hard))


def connections_of_server() -> int:
    """The bound on the connections of each server of this process: all of them together leave a quarter of the files
    that it may have open to models, pipes and connections that it opens itself."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (_MANY_FILES if files == resource.RLIM_INFINITY else files) * 3 // 4 // _SERVERS
