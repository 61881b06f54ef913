"""Predicts the speed of a group that holds all layers, for comparison with a plan without groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import isfinite

from llamaclust.cluster.planner.chain import Chain
from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.gathers import GroupLinks
from llamaclust.cluster.planner.groups.fitting import fitted
from llamaclust.cluster.planner.groups.tables import GroupTables
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.memory import MemoryModel, PlanRequest
from llamaclust.cluster.planner.plan import RejectedGroup, usual_prompt_tokens
from llamaclust.cluster.planner.work import works_of

_ALL_SETS = 4
"""Maximum number of workers for which every set is tried as a group. If there are more, only the fastest are tried."""
_NO_LINKS = "accepts no links from other members", "accept no links from other members"
_Candidate = tuple[Assignment, Chain]


def rejected_group(plan: Chain, workers: Sequence[WorkerFacts], contexts: int) -> RejectedGroup | str | None:
    """Returns the fastest group that could hold all layers. Returns a reason if no group is possible, and None if the
    plan has groups or no predicted speed."""
    if len(workers) < 2 or plan.prediction is None or any(stage.shares for stage in plan.members):
        return None
    if (obstacle := _obstacle(plan.sizes, workers)) is not None:
        return obstacle
    if (best := _best(plan, workers, contexts)) is None:
        return "no group has enough memory"
    entry, chain = best
    prediction = chain.prediction
    assert prediction is not None, "all workers were measured"
    return RejectedGroup(entry.workers, entry.shares, prediction, _reason(_request_s(chain), _request_s(plan), plan))


def _best(plan: Chain, workers: Sequence[WorkerFacts], contexts: int) -> _Candidate | None:
    best: _Candidate | None = None
    for sets in _sets(plan, workers):
        groups = [group for members in sets if (group := _group(plan.sizes, members, contexts)) is not None]
        new = min(groups, key=lambda group: _request_s(group[1]), default=None)
        if best is not None and (new is None or _request_s(new[1]) >= _request_s(best[1])):
            break
        best = new
    return best


def _obstacle(sizes: MemoryModel, workers: Sequence[WorkerFacts]) -> str | None:
    request, able = sizes.request, [worker for worker in workers if worker.joins_groups]
    if request.no_groups or request.largest_group < 2 or request.group_costs is None:
        return request.no_groups or "groups are turned off"
    if len(able) < 2:
        others = [worker for worker in workers if not worker.joins_groups]
        kind = ("has a GPU", "have a GPU") if all(worker.gpus for worker in others) else _NO_LINKS
        return f"{', '.join(worker.name for worker in others)} {kind[len(others) > 1]}"
    pairs = [*combinations([worker.name for worker in able], 2)]
    if all(frozenset(pair) in request.ungrouped for pair in pairs):
        is_disputed = frozenset(pairs[0]) in request.disputes
        return f"{' and '.join(pairs[0])} {'accuse' if is_disputed else 'cannot reach'} each other"
    if not any(request.links.are_known(pair) for pair in pairs if frozenset(pair) not in request.ungrouped):
        return f"the link between {' and '.join(pairs[0])} is not measured"
    return None


def _sets(plan: Chain, workers: Sequence[WorkerFacts]) -> Iterator[list[tuple[WorkerFacts, ...]]]:
    """Yields a list of possible groups for each size from 2 on. A group's fastest worker comes first and leads it."""
    sizes, request = plan.sizes, plan.sizes.request
    able = [worker for worker in workers if worker.joins_groups]
    able.sort(key=lambda worker: sizes.stages.decode_s(worker, 0, sizes.stages.layers))
    for count in range(2, min(len(able), request.largest_group) + 1):
        sets = combinations(able, count) if len(able) <= _ALL_SETS else (tuple(able[:count]),)
        yield [members for members in sets if _reach_each_other(request, [member.name for member in members])]


def _reach_each_other(request: PlanRequest, names: Sequence[str]) -> bool:
    return request.links.are_known(names) and not any(pair <= {*names} for pair in request.ungrouped)


def _group(sizes: MemoryModel, members: Sequence[WorkerFacts], contexts: int) -> _Candidate | None:
    names, layers, request = tuple(member.name for member in members), sizes.stages.layers, sizes.request
    assert request.group_costs is not None
    work, *_ = works_of(request.objective, usual_prompt_tokens(request.context_length))
    by_name = {member.name: member for member in members}
    for allow_unrounded in (False, True):
        tables = GroupTables(sizes, request.group_costs, contexts, allow_unrounded)
        table = tables.of(members, GroupLinks.of(request.links, names))
        if isfinite(table.of_work(work).slow[0, layers]):
            shares, _ = table.integer_shares(0, layers, work)
            entry = Assignment(names, 0, layers, shares)
            entry = fitted(sizes, entry, by_name, contexts)
            chain = Chain.of(sizes, (entry,), by_name, contexts)
            if chain.kv_blocks >= request.context_blocks:
                return entry, chain
    return None


def _request_s(chain: Chain) -> float:
    prediction, request = chain.prediction, chain.sizes.request
    assert prediction is not None, "all workers were measured"
    if request.objective == "latency":
        return prediction.answer_s
    (work,) = works_of(request.objective, usual_prompt_tokens(request.context_length))
    return max(
        sum(
            step.steps * (stage.prefill_s if step.is_prompt else stage.decode_s)(step.rows, concurrent=step.concurrent)
            for step in work.slowest
        )
        for stage in chain.stages
    )


def _reason(group_s: float, stages_s: float, plan: Chain) -> str:
    what = "a usual request alone" if plan.sizes.request.objective == "latency" else "each of many requests"
    little = "; a group has to gain 2 %" if group_s < stages_s else ""
    return f"{what} would take {group_s:.3g} s, with this plan {stages_s:.3g} s{little}"
