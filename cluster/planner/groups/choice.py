"""Whether a plan has groups: where they are clearly faster for its objective than stages of single workers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import numpy as np

from llamaclust.cluster.planner.chain import Chain, is_measured
from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.groups.members import GroupCostsOf
from llamaclust.cluster.planner.groups.search import GroupSearch, GroupSplit
from llamaclust.cluster.planner.groups.tables import GroupTables, Mix
from llamaclust.cluster.planner.groups.worker_links import split_by_links
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.plan import usual_prompt_tokens
from llamaclust.cluster.planner.predict import token_s
from llamaclust.cluster.planner.splits.worker_classes import WorkerClass, worker_classes
from llamaclust.cluster.planner.stage_parts import HeldStage
from llamaclust.cluster.planner.stage_tables import ANSWER_TOKENS, TOGETHER, stage_tables

_CLEARLY = 1.03
"""Groups have to be faster by this factor than single workers."""
_BALANCED = 1.05
_WORTH_ROOM = 1.1
"""Less room for keys and values has to make groups faster by so much."""


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """Assignments with a group at least."""

    entries: tuple[Assignment, ...]
    contexts: int  # for so many whole contexts there is KV memory at least
    is_best: bool  # of all


def better_groups(
    sizes: MemoryModel, workers: Sequence[WorkerFacts], stages: Sequence[Assignment] | None, contexts: Sequence[int]
) -> GroupChoice | None:
    """None where no groups are possible, or none are clearly faster than `stages` (None: these do not fit).
    `contexts`: for how many there should be KV memory, the most wanted number first."""
    request = sizes.request
    able = [worker.name for worker in workers if worker.joins_groups and not worker.gpus]
    if request.largest_group < 2 or request.group_costs is None or len(able) < 2 or not is_measured(workers):
        return None
    by_name = {worker.name: worker for worker in workers}
    known = None if stages is None else Chain.of(sizes, stages, by_name, min(contexts))
    found: tuple[float, int, GroupChoice] | None = None
    for count in contexts:
        split = _split(sizes, workers, request.group_costs, count, known)
        if split is None:
            continue
        chain = Chain.of(sizes, split.entries, by_name, count)
        blocks, seconds = chain.kv_blocks, _seconds(chain)
        if blocks < request.context_blocks:
            continue  # whole units are larger than what was left of a memory
        if found is None or seconds * (_WORTH_ROOM if blocks < found[1] else 1.0) < found[0]:
            found = seconds, blocks, GroupChoice(split.entries, count, split.is_best)
        if len(chain.stages) == 1 and _is_balanced(chain.stages[0]):
            break  # memory is not what decides
    if found is None or (known is not None and found[0] * _CLEARLY >= _seconds(known)):
        return None
    return found[2]


def _split(
    sizes: MemoryModel, workers: Sequence[WorkerFacts], costs: GroupCostsOf, contexts: int, known: Chain | None
) -> GroupSplit | None:
    """Workers of pairs that cannot reach each other have no part in it."""
    request = sizes.request
    constrained = frozenset[str]().union(*request.partitions)
    workers = [worker for worker in workers if worker.name not in constrained]
    if sum(worker.joins_groups and not worker.gpus for worker in workers) < 2:
        return None
    is_latency = request.objective == "latency"
    mix = Mix() if is_latency else _mix(sizes)
    alike = worker_classes(workers, partial(stage_tables, sizes, contexts))
    classes = [part for one in alike for part in split_by_links(one, workers, request.links)]
    limit = None if is_latency else inf if known is None else _seconds(known) / _CLEARLY
    if limit is not None and limit < _least_mix(classes):
        return None
    tables = GroupTables(sizes, costs, contexts, mix)
    search = GroupSearch(sizes, workers, classes, tables, request.links, request.largest_group)
    return search.best(limit=limit)


def _least_mix(classes: Sequence[WorkerClass]) -> float:
    """Of the slowest stage, if all workers divided the layers at will: groups save no work."""
    layers = classes[0].layers
    starts, ends = np.indices((layers + 1, layers + 1))
    counts = np.maximum(ends - starts, 1)
    rate = sum(len(one.workers) / max(float((one.slow / counts).min()), 1e-12) for one in classes)
    return layers / rate if rate > 0 else np.inf  # no layer fits on any worker alone


def _is_balanced(stage: HeldStage) -> bool:
    """Whether all members take about equally long."""
    seconds = stage.member_decode_s()
    return max(seconds) < _BALANCED * min(seconds)


def _mix(sizes: MemoryModel) -> Mix:
    return Mix(usual_prompt_tokens(sizes.request.context_length), TOGETHER, ANSWER_TOKENS / TOGETHER)


def _seconds(chain: Chain) -> float:
    """Of a token, or of the slowest stage's mix of work, by the objective."""
    request = chain.sizes.request
    if request.objective == "latency":
        return token_s(chain.stages, request.links)
    mix, concurrent = _mix(chain.sizes), len(chain.stages) > 1
    return max(
        stage.prefill_s(mix.prompt_rows, concurrent=concurrent)
        + mix.decodes * stage.decode_s(mix.decode_rows, concurrent=concurrent)
        for stage in chain.stages
    )
