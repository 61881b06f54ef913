"""Shortens log files that have become too large. The processes that write them keep them open."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from llamaclust.core.regular_file import open_regular, write_bytes

MOST_LOG_BYTES = 64 << 20
_KEPT_BYTES = 1 << 20
_FORMER = "~.log"
"""Ending of an older log's file name, which no worker's name can have."""


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
            file.truncate(0)  # Before the copy is written: on a full disk, that needs the space.
            write_bytes(log.with_name(log.stem + _FORMER), kept, is_synced=False)
