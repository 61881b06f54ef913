"""The limit of files and connections that this process may have open."""

from __future__ import annotations

import resource

_MANY_FILES = 1 << 16


def allow_many_files() -> None:
    """Raises this process's limit of open files to the hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MANY_FILES if hard == resource.RLIM_INFINITY else hard, hard))


def most_open_files() -> int:
    """How many may be open at once."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MANY_FILES if files == resource.RLIM_INFINITY else files
