from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
from runner.case import Case, Group, Measures, argument, option
from runner.options import existing, positive

from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch, Stage
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS
from support.arithmetic.batches import batch_of, load_stage

_NICENESS = {"quiet": None, "nice 10": 10, "nice 0": 0}


@dataclass(frozen=True)
class BusyCore(Case):
    """Compares prefill and decode beside a process that keeps a core busy with the same on a quiet machine.
    `cores` is the processor time of prefill per second: the scheduler's part in the loss of speed."""

    model: Path = argument("path of a .gguf", existing)
    threads: int = option(len(os.sched_getaffinity(0)), "number of threads that compute", positive)
    prompt: int = option(512, "number of prompt tokens", positive)
    prefills: int = option(4, "number of prefills in a turn", positive)
    tokens: int = option(128, "number of tokens that a turn decodes", positive)

    async def groups(self) -> AsyncIterator[Group]:
        length = self.prompt + self.tokens
        blocks = range(-(-length // KV_BLOCK_TOKENS))
        limits = StageLimits(self.prompt, 1, 1, len(blocks) * KV_BLOCK_TOKENS, len(blocks))
        prefill = batch_of([([1] * self.prompt, range(self.prompt), blocks)], outputs=[self.prompt - 1])
        steps = [batch_of([([1], [position], blocks)]) for position in range(self.prompt, length)]
        with Model.open(self.model) as model:
            stage = load_stage(CpuBackend(self.threads), model, limits=limits)
            stage.run(prefill, None)
            measure = partial(self._measure, stage, [prefill] * self.prefills, steps)
            yield Group("", {name: partial(measure, niceness) for name, niceness in _NICENESS.items()})
            stage.close()

    async def _measure(
        self, stage: Stage, prefills: list[Batch], steps: list[Batch], niceness: int | None, turn: int
    ) -> Measures:
        with _busy(niceness):
            before_s = process_time()
            prefill_s, first = _timed(stage, prefills)
            used_s = process_time() - before_s
            decode_s, last = _timed(stage, steps)
        speeds = {"prefill tok/s": len(prefills) * self.prompt / prefill_s, "decode tok/s": len(steps) / decode_s}
        return {**speeds, "cores": used_s / prefill_s, "logits": first + last}


def _timed(stage: Stage, batches: list[Batch]) -> tuple[float, bytes]:
    """Returns the seconds of all batches, and the last logits."""
    begun_s = perf_counter()
    for batch in batches:
        logits = stage.run(batch, None)
    return perf_counter() - begun_s, np.asarray(logits).tobytes()


@contextmanager
def _busy(niceness: int | None) -> Iterator[None]:
    """Runs a process of this niceness that never waits; none for None."""
    if niceness is None:
        yield
        return
    script = f"import os; os.nice({niceness}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()
