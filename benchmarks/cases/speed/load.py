from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time

from runner.case import Case, Group, Measures, argument, option
from runner.llama import json_of
from runner.options import existing, positive


@dataclass(frozen=True)
class Load(Case):
    """Measures the time until a model is ready, and peak memory, with and without packed layers.
    Each load runs in its own process, with files in the page cache. `ready` counts from opening the file, and `process`
    counts from the start of Python. `limit` is the allowed peak of resident memory after a prefill: 1.10 times the
    weights, plus KV memory, plus 150 MiB. "packed, copied" has packed layers in small pages, which loads must copy."""

    rounds = 3
    model: Path = argument("path of a .gguf", existing)
    threads: int = option(len(os.sched_getaffinity(0)), "number of threads that load", positive)

    async def groups(self) -> AsyncIterator[Group]:
        _read(self.model, 1 << 24)
        with TemporaryDirectory(prefix="llamaclust-load-", dir=self.model.parent) as name:
            folder = Path(name) / "packed"
            yield Group("", {"and packing": partial(self._measure, folder)}, rounds=1)
            goals = {"ready s": "1.1B Q4_K on two cores: 2 s from the file, 0.5 packed"}
            loads = {"from the file": partial(self._measure, None), "packed": partial(self._measure, folder)}
            yield Group("loads", loads, goals)
            for path in folder.glob("*.tiles"):  # Reads the packed layers again, in small pages.
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                _read(path, 1 << 16)
            yield Group("", {"packed, copied": partial(self._measure, folder)})

    async def _measure(self, folder: Path | None, turn: int) -> Measures:
        script = Path(__file__).parents[2] / "runner/loaded.py"
        words = [sys.executable, str(script), str(self.model), str(self.threads), str(folder or ""), repr(time())]
        found: dict[str, float] = await asyncio.to_thread(json_of, words)
        return {**found, "": "" if found["peak MiB"] <= found["limit MiB"] else "OVER THE LIMIT"}


def _read(path: Path, step: int) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(step):
            pass
