"""Keeps the machine busy with other processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_BUSY = 8


@contextmanager
def busy_machine() -> Iterator[None]:
    spinning = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(_BUSY)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
