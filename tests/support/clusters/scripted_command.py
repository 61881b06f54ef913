"""Runs the `generate` command against a scripted server."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from support.clusters import served
from support.clusters.forked_commands import run_forked
from support.clusters.served import ScriptedEngine, says, serving


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    out: str
    err: str


async def command(*arguments: str, piped: bytes = b"", state_dir: Path | None = None) -> Ended:
    """Runs the command to its end with `piped` on standard input."""
    environment = {**os.environ, "LLAMACLUST_STATE_DIR": str(state_dir or "/nonexistent/state")}
    return await asyncio.to_thread(_run, arguments, environment, piped)


def _run(arguments: Sequence[str], environment: dict[str, str], piped: bytes) -> Ended:
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = run_forked(["llamaclust", *arguments], environment, Path.cwd(), out, err, 60.0, piped)
        return Ended(code, out.read_bytes().decode(), err.read_bytes().decode())


@asynccontextmanager
async def scripted(text: str, **settings: Any) -> AsyncIterator[tuple[str, ScriptedEngine]]:
    engine = ScriptedEngine(says(text))
    async with serving(served.make_app(engine, **settings)) as url:
        yield url, engine


_DEADLINE_S = 60.0


class Terminal:
    """The command on its own terminal."""

    def __init__(self, primary: int, process: asyncio.subprocess.Process) -> None:
        self._primary = primary
        self.process = process
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._primary, text.encode())

    async def shows(self, text: str, times: int = 1, *, after: str = "") -> None:
        """Waits until the text is on the screen `times` times after the last occurrence of `after`."""
        async with asyncio.timeout(_DEADLINE_S):
            while after not in self.seen or self._behind(after).count(text) < times:
                await asyncio.sleep(0.01)
                try:
                    self.seen += os.read(self._primary, 1 << 16).decode()
                except BlockingIOError:
                    continue

    def _behind(self, text: str) -> str:
        return self.seen[self.seen.rfind(text) + len(text) :] if text else self.seen

    async def ends(self) -> int:
        """Waits for the end of the process and returns its exit status."""
        async with asyncio.timeout(_DEADLINE_S):
            return await self.process.wait()


@asynccontextmanager
async def terminal(*arguments: str, state_dir: Path) -> AsyncIterator[Terminal]:
    primary, secondary = pty.openpty()
    os.set_blocking(primary, False)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llamaclust", *arguments),
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env={**os.environ, "TERM": "dumb", "LLAMACLUST_STATE_DIR": str(state_dir)},
        start_new_session=True,
    )
    os.close(secondary)
    shown = Terminal(primary, process)
    try:
        yield shown
    except TimeoutError as error:
        raise AssertionError(f"the terminal shows {shown.seen!r}") from error
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        os.close(primary)
