"""Decides which worker holds which layers, and says what that should bring. Pure.

Which workers are used: under `throughput` all that make the slowest stage faster. Under `latency` the k fastest, with
the largest k whose predicted computing time per token is within 10 % of the best k's: workers that are alike are all
used, since they cost no more than a hop, and workers that are slower than that stay spares. Workers that memory needs
are used in any case. Without measurements of every worker all are taken to be alike.

Where layers are cut: so that the slowest stage is as fast as possible, at a mix of work that has the head (on the last
stage) in its decode part: 512 tokens of prompt and 128 of answer for each of eight sequences that run together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llamaclust.cluster.costs import StageCosts, WorkerFacts
from llamaclust.cluster.plan import Plan, StagePlan
from llamaclust.cluster.planner_fit import PlanLimits, Sizes
from llamaclust.cluster.planner_manual import Assignment, checked
from llamaclust.cluster.planner_predict import predict
from llamaclust.cluster.planner_search import MAX_ORDERED, Table, best_order, slowest_cut
from llamaclust.cluster.planner_shortage import cut_does_not_fit, does_not_fit
from llamaclust.cluster.planner_spares import spares
from llamaclust.cluster.planner_workspace import ModelWorkspace
from llamaclust.model.loader import ModelCosts

PROMPT_TOKENS = 512
_ANSWER_TOKENS = 128
_TOGETHER = 8
_ALIKE = 1.1
_WORTH_ANOTHER_ORDER = 0.95

_NOMINAL_READ_GB_S = 20.0
_NOMINAL_INT8_GMAC_S = 300.0


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is asked of a plan."""

    context_length: int
    max_sequences: int
    workspace: ModelWorkspace
    objective: str = "latency"  # latency | throughput
    manual: tuple[Assignment, ...] | None = None
    kv_memory_bytes: int | None = None  # per worker, at most; None: up to half of what weights and workspace leave
    hop_ms: float = 0.15  # one way, from worker to worker or coordinator


def make_plan(costs: ModelCosts, workers: Sequence[WorkerFacts], ask: PlanRequest) -> Plan:
    """Raises UsageError for a plan by hand that is wrong, DoesNotFitError with the missing MiB."""
    stages = StageCosts.of(costs)
    sizes = Sizes(stages, PlanLimits(ask.context_length, ask.max_sequences, ask.workspace, ask.kv_memory_bytes))
    if ask.manual is not None:
        contexts, cut = 1, checked(ask.manual, [worker.name for worker in workers], stages.layers)
    else:
        contexts, cut = _automatic(stages, sizes, workers, ask.objective)
    by_name = {worker.name: worker for worker in workers}
    ranges = [(by_name[name], start, end) for name, start, end in cut]
    kv_blocks = sizes.kv_blocks(ranges)
    if kv_blocks < sizes.limits.context_blocks:
        raise cut_does_not_fit(sizes, ranges)
    planned = tuple(_stage(stages, sizes, *stage, kv_blocks) for stage in ranges)
    used = {name for name, _, _ in cut}
    plan = Plan(
        stages=planned,
        kv_blocks=kv_blocks,
        context_length=ask.context_length,
        token_ms=None,
        ttft_ms=None,
        tokens_per_s=None,
        limiting=None,
        spares=spares(sizes, workers, used, by_hand=ask.manual is not None, contexts=contexts),
    )
    facts = [by_name[stage.worker] for stage in planned]
    return predict(plan, stages, facts, ask.max_sequences, ask.hop_ms) if _measured(facts) else plan


def _stage(stages: StageCosts, sizes: Sizes, worker: WorkerFacts, start: int, end: int, kv_blocks: int) -> StagePlan:
    return StagePlan(
        worker=worker.name,
        start=start,
        end=end,
        weight_bytes=stages.weight_bytes(start, end),
        kv_bytes=kv_blocks * stages.kv_block_bytes(start, end),
        workspace_bytes=sizes.workspace_bytes(worker, end),
        memory_bytes=worker.memory_bytes,
        decode_ms=None,
        prefill_ms=None,
    )


def _measured(workers: Sequence[WorkerFacts]) -> bool:
    return all(worker.read_gb_s is not None and worker.int8_gmac_s is not None for worker in workers)


def _automatic(
    stages: StageCosts, sizes: Sizes, workers: Sequence[WorkerFacts], objective: str
) -> tuple[int, tuple[Assignment, ...]]:
    """(for how many whole contexts there is KV memory at least, the cut)."""
    if not _measured(workers):
        workers = [
            replace(worker, read_gb_s=_NOMINAL_READ_GB_S, int8_gmac_s=_NOMINAL_INT8_GMAC_S) for worker in workers
        ]
    for contexts in sizes.wanted_contexts:
        able = [worker for worker in workers if sizes.holds_a_layer(worker, contexts)]
        cut = _cut(stages, sizes, able[: stages.layers], objective, contexts) if able else None
        if cut is not None:
            return contexts, cut
    raise does_not_fit(sizes, workers)


def _cut(
    stages: StageCosts, sizes: Sizes, workers: Sequence[WorkerFacts], objective: str, contexts: int
) -> tuple[Assignment, ...] | None:
    """The best cut with KV memory for that many whole contexts, or None where there is none."""
    kinds = {replace(worker, name=""): worker for worker in workers}
    of_kind = {kind: _tables(stages, sizes, worker, contexts) for kind, worker in kinds.items()}
    tables = {worker.name: of_kind[replace(worker, name="")] for worker in workers}
    if objective == "throughput":
        return _ordered(workers, tables, may_skip=True)
    fastest = sorted(workers, key=lambda worker: float(tables[worker.name][1][0, stages.layers]))
    best: tuple[Assignment, ...] | None = None
    best_ms = np.inf
    for count in range(1, len(workers) + 1):
        chosen = [worker for worker in workers if worker in fastest[:count]]
        cut = _ordered(chosen, tables, may_skip=False) or _ordered(chosen, tables, may_skip=True)
        if cut is not None:
            ms = sum(float(tables[name][1][start, end]) for name, start, end in cut)
            if ms <= best_ms * _ALIKE:
                best, best_ms = cut, min(ms, best_ms)
    return best


def _tables(stages: StageCosts, sizes: Sizes, worker: WorkerFacts, contexts: int) -> tuple[Table, Table]:
    """(time of the mix of work where the stage fits, time of one token) of each stage on a worker."""
    shape = (stages.layers + 1, stages.layers + 1)
    mix, token = np.full(shape, np.inf), np.full(shape, np.inf)
    for start in range(stages.layers):
        for end in range(start + 1, stages.layers + 1):
            token[start, end] = stages.decode_ms(worker, start, end)
            if sizes.fits(worker, start, end, contexts):
                answer = stages.decode_ms(worker, start, end, _TOGETHER) * _ANSWER_TOKENS / _TOGETHER
                mix[start, end] = stages.prefill_ms(worker, start, end, PROMPT_TOKENS) + answer
    return mix, token


def _ordered(
    workers: Sequence[WorkerFacts], tables: dict[str, tuple[Table, Table]], may_skip: bool
) -> tuple[Assignment, ...] | None:
    """The cut with the fastest slowest stage: in the given order, unless another one is clearly better."""
    order = [worker.name for worker in workers]
    found = slowest_cut([tables[name][0] for name in order], [tables[name][1] for name in order], may_skip)
    if len(order) <= MAX_ORDERED:
        other = best_order([tables[name][0] for name in order])
        if other is not None and (found is None or other[0] < found[0] * _WORTH_ANOTHER_ORDER):
            order = [order[index] for index in other[1]]
            found = slowest_cut([tables[name][0] for name in order], [tables[name][1] for name in order], may_skip)
    if found is None:
        return None
    bounds = found[1]
    stages = zip(order, bounds[:-1], bounds[1:], strict=True)
    return tuple((name, start, end) for name, start, end in stages if start < end)
