"""Workers with equal links, whose automatic plans may have groups."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from llamaclust.cluster.planner.costs import WorkerFacts
from llamaclust.cluster.planner.links import COORDINATOR, Link, Links
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.core.sizes import MIB
from support.plans.plan_inputs import LAYER, REQUEST, SMALL, group_costs, worker

LARGE = replace(SMALL, layers=(replace(LAYER, weight_bytes=100 * MIB),) * 12)
AUTO = replace(REQUEST, group_costs=partial(group_costs, LARGE), largest_group=16)


def able(name: str, read: float = 20, memory_mib: int = 10_000) -> WorkerFacts:
    return replace(worker(name, memory_mib, read, 15 * read), joins_groups=True)


def network(names: Sequence[str], gather_us: float, byte_s: float = 0.4e-9, **others: Link) -> Links:
    """Builds links of equal speed; `others`: different ones by the names of two workers."""
    usual = Link(gather_us / 1e6 + 1.5e-4, byte_s, gather_us / 1e6)
    known = {frozenset(pair): usual for pair in itertools.combinations((COORDINATOR, *names), 2)}
    return Links(known | {frozenset(pair): link for pair, link in others.items()})


def planned(workers: Sequence[WorkerFacts], gather_us: float = 5, **request: Any) -> Plan:
    links = network([each.name for each in workers], gather_us)
    reaches = links.reaches([each.name for each in workers])
    facts = [replace(each, reach=reaches[each.name]) for each in workers]
    return make_plan(LARGE, facts, replace(replace(AUTO, links=links), **request))
