"""Checks that GPU stages reject the batches that the CPU's executor rejects, before kernels run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.kernels.backend import Batch, Stage
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.executor.batch_checks import check_batch
from support.arithmetic.batches import batch_of, load_stage
from support.cuda.stages import LIMITS, Open
from support.seed import SEED

WINDOW_LIMITS = replace(LIMITS, window_blocks=4)
WINDOW = 6
DAMAGES = 300

Int32 = NDArray[np.int32]


def whole() -> Batch:
    """Builds a batch of two sequences; the first has a block behind the window, and a block after its last row."""
    batch = batch_of([([5] * 3, range(33, 36), [0, 1, 2, 7]), ([6], [0], [4])], outputs=[2, 3])
    return replace(batch, window_tables=np.array([-1, 1, 3, -1, 2], np.int32))


CASES: dict[str, tuple[str, Callable[[Batch], Int32]]] = {
    "KV block is -1, outside": ("block_tables", lambda batch: changed(batch.block_tables, 0, -1)),
    "KV block is 24, outside": ("block_tables", lambda batch: changed(batch.block_tables, 4, 24)),
    "window block is -1, outside": ("window_tables", lambda batch: changed(windows(batch), 2, -1)),
    "window block is -3, outside": ("window_tables", lambda batch: changed(windows(batch), 1, -3)),
    "window block is -2, outside": ("window_tables", lambda batch: changed(windows(batch), 4, -2)),
    "window block is 4, outside": ("window_tables", lambda batch: changed(windows(batch), 2, 4)),
    "number of window_tables is 3, expected 5, as": ("window_tables", lambda batch: windows(batch)[:3]),
    "position is -1, outside": ("positions", lambda batch: changed(batch.positions, 3, -1)),
    "position is 50, expected 35": ("positions", lambda batch: changed(batch.positions, 2, 50)),
    "number of positions is 51, but the block table has": ("positions", lambda batch: changed(batch.positions, 3, 50)),
    "position is 128, outside": ("positions", lambda batch: changed(batch.positions, 3, 128)),
    "output row is 4, outside": ("output_rows", lambda batch: changed(batch.output_rows, 1, 4)),
    "output row is 2, outside": ("output_rows", lambda batch: changed(batch.output_rows, 1, 2)),
    "sequence_starts is 4, expected 5 or more": ("sequence_starts", lambda batch: changed(batch.sequence_starts, 1, 4)),
    "table_starts is 4, expected 5$": ("table_starts", lambda batch: changed(batch.table_starts, 2, 4)),
    "number of tokens is 3, expected 4": ("tokens", lambda batch: batch.tokens[:3]),
    "number of outputs is 65, outside": ("output_rows", lambda batch: np.arange(65, dtype=np.int32)),
}


def changed(numbers: Int32, place: int, number: int) -> Int32:
    found = numbers.copy()
    found[place] = number
    return found


def with_numbers(batch: Batch, field: str, numbers: Int32) -> Batch:
    return replace(batch, **{field: numbers})  # type: ignore[arg-type]


def windows(batch: Batch) -> Int32:
    assert batch.window_tables is not None
    return batch.window_tables


def empty() -> Batch:
    none = np.array([], np.int32)
    starts = np.zeros(1, np.int32)
    return Batch(none, none, starts, starts, none, none, window_tables=none)


def is_refused(check: Callable[[], object]) -> bool:
    try:
        check()
    except ValueError:
        return True
    return False


@pytest.fixture(scope="module")
def stage(opened: Open, cpu: CpuBackend) -> Stage:
    model = opened("gemma2")
    assert model.window == WINDOW
    return load_stage(cpu, model, limits=WINDOW_LIMITS)


@pytest.mark.parametrize("message", CASES)
def test_each_is_named(stage: Stage, message: str) -> None:
    """Window blocks that no row reaches may have any number; rows reach the window before the first row."""
    check_batch(whole(), WINDOW_LIMITS, WINDOW)
    field, change = CASES[message]
    bad = with_numbers(whole(), field, change(whole()))
    with pytest.raises(ValueError, match=f"batch: {message}"):
        check_batch(bad, WINDOW_LIMITS, WINDOW)
    assert is_refused(lambda: stage.run(bad, None))


def test_an_empty_batch_is_refused(stage: Stage) -> None:
    with pytest.raises(ValueError, match="batch: number of rows is 0, outside"):
        check_batch(empty(), WINDOW_LIMITS, WINDOW)
    assert is_refused(lambda: stage.run(empty(), None))


def test_stages_refuse_before_they_compute(opened: Open, cuda: CudaBackend) -> None:
    stage = load_stage(cuda, opened("gemma2"), limits=WINDOW_LIMITS)
    for field, change in CASES.values():
        with pytest.raises(ValueError, match=r"^batch: .*(is|are) -?\d"):
            stage.run(with_numbers(whole(), field, change(whole())), None)
    stage.close()


def damaged(random: Random, field: str, numbers: Int32) -> Int32:
    """Changes one number, or removes or appends some; token ids stay, which the GPU's checks do not cover."""
    if field == "tokens" or random.random() < 0.3:
        kept = numbers[: random.randrange(len(numbers) + 1)]
        return random.choice([kept, np.append(numbers, numbers[-1:] + random.choice([0, 1])), kept[:0]])
    near = int(random.choice(numbers.tolist())) + random.choice([-17, -1, 0, 1, 16])
    return changed(numbers, random.randrange(len(numbers)), near)


def test_random_damage_is_refused_where_the_processor_refuses_it(stage: Stage) -> None:
    random = Random(SEED)
    fields = ("positions", "sequence_starts", "table_starts", "block_tables", "output_rows", "window_tables", "tokens")
    refused = 0
    for _ in range(DAMAGES):
        batch = whole()
        for field in random.sample(fields, random.choice([1, 1, 2])):
            batch = with_numbers(batch, field, damaged(random, field, getattr(batch, field)))
        by_cpu = is_refused(partial(stage.run, batch, None))
        assert is_refused(partial(check_batch, batch, WINDOW_LIMITS, WINDOW)) == by_cpu, batch
        refused += by_cpu
    assert DAMAGES // 4 < refused < DAMAGES
