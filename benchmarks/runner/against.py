"""Runs a case in another checkout and in this checkout, in turns. Each checkout has a process that measures a turn."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llamaclust.core.errors import LlamaclustError, UsageError
from runner.case import Case, Group, Measures
from runner.turns import packed, unpacked

_SERVE = "--serve"
_MOST_BYTES = 1 << 24


@dataclass(frozen=True)
class Against(Case):
    """Yields a group for each variant of a case. The group compares this checkout with the other checkout."""

    tree: Path
    arguments: Sequence[str]
    rounds_of_case: int

    async def groups(self) -> AsyncIterator[Group]:
        other = self.tree / ".venv" / "bin" / "python"
        if not other.exists():
            raise UsageError(f"--against {self.tree}: the checkout has no {other}; run `make build .venv/.test` there")
        there, here = [await _start(str(python), self.arguments) for python in (other, sys.executable)]
        is_done = False
        try:
            while (head := await _answer(there)) is not None and await _answer(here) is not None:
                for variant in head["variants"]:
                    measured = {"other": partial(_measure, there, variant), "this": partial(_measure, here, variant)}
                    yield Group(f"{head['name']} {variant}".strip(), measured)
                for process in (there, here):
                    _tell(process, None)
            is_done = True
        finally:
            for process in (there, here):
                if not is_done and process.returncode is None:
                    process.terminate()
                assert process.stdin is not None
                process.stdin.close()  # A thread of the process may wait for a line.
                await process.wait()


async def _start(python: str, arguments: Sequence[str]) -> asyncio.subprocess.Process:
    pipe, script = asyncio.subprocess.PIPE, str(Path(__file__).parents[1] / "run.py")
    words = (python, script, *arguments, _SERVE)
    return await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, limit=_MOST_BYTES)


async def _measure(process: asyncio.subprocess.Process, variant: str, turn: int) -> Measures:
    _tell(process, [variant, turn])
    found = await _answer(process)
    assert found is not None
    return unpacked(found)


def _tell(process: asyncio.subprocess.Process, what: object) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(what).encode() + b"\n")


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any] | None:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line and await process.wait():
        raise LlamaclustError(f"the process of a case ended with exit status {process.returncode}")
    return json.loads(line) if line else None


async def serve(case: Case) -> None:
    """Measures each turn whose number it reads from standard input, and prints the results. Other output goes to
    stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        async with aclosing(case.groups()) as groups:  # type: ignore[type-var]
            async for group in groups:
                print(json.dumps({"name": group.name, "variants": [*group.variants]}), file=out, flush=True)
                while order := json.loads(await asyncio.to_thread(sys.stdin.readline) or "null"):
                    measures = await group.variants[order[0]](order[1])
                    group.turns.append({order[0]: measures})
                    print(json.dumps(packed(measures)), file=out, flush=True)
