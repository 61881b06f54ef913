"""Gives priority to processes, and counts their instructions with `perf stat`. Other programs do not affect the
count."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory

from llamaclust.core.errors import LlamaclustError

_REPLY_S = 20.0
_LOOK_S = 0.2


@dataclass(slots=True)
class Instructions:
    """A number of instructions. It is None until the counting ends, or if `perf` or its counters are missing."""

    count: int | None = None

    def per(self, tokens: int) -> dict[str, float]:
        return {} if self.count is None else {"k instr": self.count / 1e3 / tokens}


@asynccontextmanager
async def counted_instructions(pid: int) -> AsyncIterator[Instructions]:
    counted = Instructions()
    if (perf := shutil.which("perf")) is None:
        yield counted
        return
    with TemporaryDirectory(prefix="llamaclust-") as folder:
        control, reply, result = (Path(folder) / name for name in ("control", "reply", "result"))
        os.mkfifo(control)
        os.mkfifo(reply)
        words = ["stat", "-x,", "-e", "instructions:u", "-D", "-1", "-p", str(pid)]
        words += ["--control", f"fifo:{control},{reply}", "-o", str(result)]
        with _endless(control) as orders, _endless(reply) as replies:
            process = await asyncio.create_subprocess_exec(perf, *words, stdin=DEVNULL, stderr=DEVNULL)
            await _order(process, orders, replies, b"enable\n")
            yield counted
            await _order(process, orders, replies, b"disable\n")
            process.send_signal(signal.SIGINT)
            await asyncio.wait_for(process.wait(), _REPLY_S)
        counted.count = _count(result.read_text())


def _endless(fifo: Path) -> FileIO:
    """Opens both ends of the fifo, so that opening does not wait for `perf` and reading never meets an end of file."""
    return FileIO(fifo, "r+")


async def _order(process: Process, orders: FileIO, replies: FileIO, words: bytes) -> None:
    orders.write(words)
    async with asyncio.timeout(_REPLY_S):
        while process.returncode is None:
            if await asyncio.to_thread(select.select, [replies], [], [], _LOOK_S) != ([], [], []):
                replies.read(16)
                return
    raise LlamaclustError(f"perf stat ended with exit status {process.returncode}")


def _count(text: str) -> int | None:
    fields = [line.split(",")[0] for line in text.splitlines() if "instructions" in line]
    return int(fields[0]) if fields and fields[0].isdigit() else None


@contextmanager
def before_other_programs(pids: Iterable[int], *, priority: int = 1) -> Iterator[None]:
    """Gives the processes' threads real-time priority in this context. Raises PermissionError if not permitted."""
    threads = [int(each.name) for pid in pids for each in Path(f"/proc/{pid}/task").iterdir()]
    try:
        _schedule(threads, os.SCHED_RR, priority)
        yield
    finally:
        _schedule(threads, os.SCHED_OTHER, 0)


def _schedule(threads: Iterable[int], policy: int, priority: int) -> None:
    for thread in threads:
        with suppress(ProcessLookupError):  # The thread has just ended.
            os.sched_setscheduler(thread, policy, os.sched_param(priority))
