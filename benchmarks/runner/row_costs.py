"""Measures the time of a microbatch by its number of rows, and computes the gain that drafts can have."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter_ns

import numpy as np

from llamaclust.core.errors import UsageError
from llamaclust.core.limits import StageLimits
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.tasks import SampleTask
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.model.kv_type import KvType
from llamaclust.model.loader import Model
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs
from llamaclust.worker.stage.stage_runner import StageOptions, StageRunner

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 33)
_PREFILL = 512
_REPEATS = 9
_MOST_WINDOW = 32


@dataclass(frozen=True, slots=True)
class RowCosts:
    rows: tuple[int, ...]
    ns: tuple[float, ...]
    prefill_row_ns: float

    def at(self, rows: float) -> float:
        return float(np.interp(rows, self.rows, self.ns))

    @property
    def prefill_to_decode(self) -> float:
        """The number of prompt tokens that are computed in the time of one answer token."""
        return self.ns[0] / self.prefill_row_ns

    def allowed_gain(self, acceptance: float) -> float:
        """Returns the gain with the best fixed number of drafted tokens, each of which is right with the probability
        `acceptance`."""
        return max(
            sum(acceptance**depth for depth in range(window + 1)) * self.at(1) / self.at(window + 1)
            for window in range(_MOST_WINDOW + 1)
        )

    def show(self) -> None:
        print("rows  " + "".join(f"{rows:8}" for rows in self.rows) + f"  prefill of {_PREFILL}, a row")
        print("ms    " + "".join(f"{ns / 1e6:8.2f}" for ns in self.ns) + f"  {self.prefill_row_ns / 1e6:.3f}")
        times = "".join(f"{ns / self.ns[0]:8.2f}" for ns in self.ns)
        print(f"times {times}  one token / one row of a prefill: {self.prefill_to_decode:.1f}", flush=True)


def measured(path: Path, threads: int, position: int, seed: int = 1) -> RowCosts:
    """Measures the whole model after `position` tokens. Raises UsageError for attention windows or recurrent states."""
    with Model.open(path) as model:
        if model.window is not None or model.has_states:
            raise UsageError(f"{path} has attention windows or states; choose a model whose layers see all tokens")
        context = min(max(position + ROWS[-1], _PREFILL), model.hyperparameters.context_length)
        blocks = -(-context // KV_BLOCK_TOKENS)
        limits = StageLimits(_PREFILL, ROWS[-1], 1, context, blocks, KvType.F16)
        runner = StageRunner(CpuBackend(threads), model, 0, model.layer_count, limits, StageOptions(threads=threads))
        try:
            return _measured(runner, model, context, position, random.Random(seed))
        finally:
            runner.close()


def _measured(runner: StageRunner, model: Model, context: int, position: int, draw: random.Random) -> RowCosts:
    tokens = [draw.randrange(model.hyperparameters.vocabulary_size) for _ in range(context)]
    table = (0, -(-context // KV_BLOCK_TOKENS))

    def run(start: int, rows: int, outputs: int) -> None:
        chunk = Chunk(tuple(tokens[start : start + rows]), start, table, outputs)
        logits = runner.run_to_sample(Microbatch(model.model_id, 1, 0, (chunk,)))
        tasks = tuple(SampleTask(SamplingParams(), 0, 0, start + row + 1) for row in range(outputs))
        runner.finish(logits, SamplingInputs(1, 0, tasks))

    prompt = min(_PREFILL, context)
    prefill_ns = _times([lambda: run(0, prompt, 1)])[0]
    place = min(position, context - ROWS[-1])
    return RowCosts(ROWS, tuple(_times([_bound(run, place, rows) for rows in ROWS])), prefill_ns / prompt)


def _bound(run: Callable[[int, int, int], None], place: int, rows: int) -> Callable[[], None]:
    return lambda: run(place, rows, rows)


def _times(works: Sequence[Callable[[], None]]) -> list[float]:
    """Returns each function's median time in ns. The functions run in turn. Their first calls do not count."""
    taken: list[list[int]] = [[] for _ in works]
    for _ in range(_REPEATS + 1):
        for work, times in zip(works, taken, strict=True):
            begun_ns = perf_counter_ns()
            work()
            times.append(perf_counter_ns() - begun_ns)
    return [median(times[1:]) for times in taken]
