"""Shortens log files that have become too large, while other processes have them open for writing."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from llamaclust.core.regular_file import open_regular, write_bytes

MOST_LOG_BYTES = 64 << 20
_KEPT_BYTES = 1 << 20
_FORMER = "~.log"
"""File name suffix for a copy of a shortened log's last lines. No worker's log has this suffix."""


def limit_logs(folder: Path) -> None:
    for log in folder.glob("*.log"):
        limit_log(log)


def limit_log(log: Path) -> None:
    with suppress(OSError):
        if log.name.endswith(_FORMER) or log.stat(follow_symlinks=False).st_size <= MOST_LOG_BYTES:
            return
        with open_regular(log, follows_links=False, is_writable=True) as file:
            file.seek(-_KEPT_BYTES, os.SEEK_END)
            kept = file.read(_KEPT_BYTES)
            file.truncate(0)  # Truncated before the copy is written, because a full disk has no space for both.
            write_bytes(log.with_name(log.stem + _FORMER), kept, is_synced=False)
