from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from llamaclust.cluster.planner.costs import Table, WorkerFacts
from llamaclust.cluster.planner.devices import Division
from llamaclust.cluster.planner.links import Link
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.splits.holders import StageTable
from llamaclust.cluster.planner.work import Rows, Work

_STAGE_S = 1e-9
"""Small cost of each stage. If two splits are equally fast, the split with fewer stages wins."""


def stage_tables(
    sizes: MemoryModel, contexts: int, works: Sequence[Work], worker: WorkerFacts
) -> tuple[StageTable, ...]:
    """Returns the costs of the worker's stages, one table per workload. A stage that does not fit costs infinity."""
    division = sizes.division(worker, contexts)
    fits = (sizes.shortfall_table(worker, contexts) == 0) & sizes.stages.possible
    return tuple(_table(sizes, division, work, worker).where(fits) for work in works)


def _table(sizes: MemoryModel, division: Division, work: Work, worker: WorkerFacts) -> StageTable:
    layers, links = sizes.stages.layers, link_table(sizes, work, worker.reach)
    slow = _seconds(sizes, division, worker, work.slowest)
    if work.slowest:  # A stage of all layers has no concurrent stage.
        alone = [Rows(steps.rows, steps.steps, steps.is_prompt) for steps in work.slowest]
        slow[0, layers] = _seconds(sizes, division, worker, alone)[0, layers]
    total = _seconds(sizes, division, worker, work.each) + links.total + _STAGE_S
    return StageTable(np.maximum(slow, links.slow), total)


def _seconds(sizes: MemoryModel, division: Division, worker: WorkerFacts, steps: Iterable[Rows]) -> Table:
    total: Table = np.zeros(sizes.stages.held_bytes.shape)
    for each in steps:
        total += each.steps * _step_s(sizes, division, worker, each)
    return total


def _step_s(sizes: MemoryModel, division: Division, worker: WorkerFacts, step: Rows) -> Table:
    stages = sizes.stages
    table = partial(
        stages.prefill_table if step.is_prompt else stages.decode_table, rows=step.rows, concurrent=step.concurrent
    )
    if not worker.gpus:
        return table(worker)
    return division.sums(table) + division.moved(
        lambda device, layers: stages.experts_table(device, step.rows, layers, concurrent=step.concurrent),
        partial(stages.exchange_table, step.rows),
    )


def link_table(sizes: MemoryModel, work: Work, reach: Link) -> StageTable:
    """Returns the seconds that `reach`, the worker's part of link times, adds to transfers from and to each stage."""
    stages = sizes.stages
    others = np.ones(stages.held_bytes.shape)
    others[0, stages.layers] = 0  # A stage of all layers has no links.
    crossing = work.slowest_rows * stages.border_bytes
    row_bytes = work.hop_rows * stages.border_bytes
    row_bytes[[0, -1]] = 0  # The last stage returns only a token id to the first stage.
    return StageTable(
        others * reach.byte_s * (crossing[:, np.newaxis] + crossing),
        others * (2 * work.hops * reach.one_way_s + reach.byte_s * (row_bytes[:, np.newaxis] + row_bytes)),
    )
