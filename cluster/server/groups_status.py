"""Formats a model's groups for `llamaclust status --json`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.plan import StagePrediction
from llamaclust.wire.control.groups import GroupCounters
from llamaclust.wire.control.messages import Load


def groups_json(
    workers: Collection[WorkerHandle], model_id: str, predicted: Mapping[str, StagePrediction]
) -> list[dict[str, Any]]:
    orders = {handle.name: order for handle in workers if (order := handle.order_of(model_id)) is not None}
    counters = {handle.name: counters_of(handle, model_id) for handle in workers}
    led = [(name, order) for name, order in orders.items() if order.group is not None and order.group.member == 0]
    led.sort(key=lambda group: group[1].start)
    return [_group(order, counters, predicted.get(name)) for name, order in led]


def counters_of(handle: WorkerHandle, model_id: str) -> GroupCounters | None:
    order = handle.order_of(model_id)
    progress = None if order is None else handle.progress(order.epoch)
    return None if progress is None else progress.group


def _group(
    order: Load, counters: Mapping[str, GroupCounters | None], predicted: StagePrediction | None
) -> dict[str, Any]:
    assert order.group is not None, "the order of a leader"
    members = order.group.members
    all_counters = [counted for member in members if (counted := counters.get(member.worker)) is not None]
    # Seconds that the other members waited for each member in exchanges.
    waited_for_s = [
        sum(counted.waited_for_s[place] for counted in all_counters if place < len(counted.waited_for_s))
        for place in range(len(members))
    ]
    own = counters.get(members[0].worker) or GroupCounters()
    most = max(range(len(members)), key=waited_for_s.__getitem__)
    return {
        "layers": order.limits.places(order.start, order.end),
        "members": [
            {"worker": member.worker, "share": member.share, "waited_for_s": seconds}
            for member, seconds in zip(members, waited_for_s, strict=True)
        ],
        "gathers": own.gathers,
        "waited_s": own.waited_s,
        "gathers_ms": 1e3 * own.one_row_waited_s / own.one_row_steps if own.one_row_steps else None,
        "predicted_gathers_ms": None if predicted is None else 1e3 * predicted.gathers_s,
        "waits_most_for": members[most].worker if waited_for_s[most] else None,
    }
