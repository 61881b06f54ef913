"""Finds the worker that caused the failure of a pipeline. Reports about a failure may arrive in any order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

from llamaclust.cluster.control.failures.group_verdict import dispute, judge
from llamaclust.cluster.engine.pipeline import StageInfo
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.errors import DisputeError, LlamaclustError, WorkerError
from llamaclust.wire.control.groups import GroupFault

_ATTRIBUTION_S = 1.0
"""Seconds to wait after a broken stream, because the loss of a worker may be noticed a little later."""
_REPORTS_S = 10.0
"""Seconds to wait for the other group members' reports, because the first report may name the wrong worker."""


def stage_of(epoch: int, worker: WorkerHandle) -> StageInfo:
    order, _ = worker.stages[epoch]
    shares, member = (order.group.shares, order.group.member) if order.group else ((), 0)
    return StageInfo(worker.name, order.start, order.end, (), order.limits.expert_shards, shares, member)


def root_cause(epoch: int, workers: Sequence[WorkerHandle]) -> WorkerHandle | None:
    """Returns the worker that was lost first, or None if none is lost. Prefers workers that others could not reach."""
    unreachable = {worker.unreachable_peer(epoch).name for worker in workers}
    lost = (worker for worker in workers if worker.loss is not None)
    return min(
        lost,
        key=lambda worker: (worker.name not in unreachable, worker.loss.number if worker.loss else 0),
        default=None,
    )


async def has_failed(epoch: int, workers: Sequence[WorkerHandle]) -> None:
    """Waits until a worker is lost or a group member reports a failure."""
    signs: list[Awaitable[object]] = [worker.lost.wait() for worker in workers]
    for members in groups_of(epoch, workers):
        signs += [member.group_faults(epoch).reported.wait() for member in members]
        signs += [_is_cut_off(epoch, member, members) for member in members]
    tasks = [asyncio.ensure_future(sign) for sign in signs]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def attribute_failure(
    epoch: int, workers: Sequence[WorkerHandle], ended: LlamaclustError | None
) -> LlamaclustError:
    """Waits for the cause of a pipeline's failure. Returns an error that names the worker at fault, or that quotes
    `ended` if no worker is known to be at fault."""
    signs: list[asyncio.Task[bool]] = [asyncio.create_task(worker.lost.wait()) for worker in workers]
    signs += [asyncio.create_task(_is_partitioned(epoch, worker, workers)) for worker in workers]
    signs += [asyncio.create_task(_can_be_judged(epoch, group)) for group in groups_of(epoch, workers)]
    try:
        done, _ = await asyncio.wait(signs, timeout=_ATTRIBUTION_S, return_when=asyncio.FIRST_COMPLETED)
        if not done and _reports(epoch, workers):
            await asyncio.wait(signs, timeout=_REPORTS_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for sign in signs:
            sign.cancel()
    if (cause := root_cause(epoch, workers)) is not None:
        return cause.error
    if (cut := _cut_members(epoch, workers)) is not None:
        return WorkerError(f"workers {' and '.join(cut)} of a group cannot reach each other")
    for members in groups_of(epoch, workers):
        if (error := _verdict(epoch, members, ended)) is not None:
            return error
    stages = (stage_of(epoch, worker) for worker in workers)
    names = ", ".join(f"{stage.worker} [{stage.start}, {stage.end})" for stage in stages)
    worker = None if ended is None else ended.worker
    return WorkerError(f"the pipeline of workers {names} broke: {ended}", worker=worker)


def groups_of(epoch: int, workers: Sequence[WorkerHandle]) -> list[list[WorkerHandle]]:
    groups: dict[bytes, list[WorkerHandle]] = {}
    for worker in workers:
        order, _ = worker.stages[epoch]
        if order.group is not None:
            groups.setdefault(order.group.group_id, []).append(worker)
    return [*groups.values()]


def _reports(epoch: int, workers: Sequence[WorkerHandle]) -> dict[str, GroupFault]:
    faults = ((worker.name, worker.group_faults(epoch).fault) for worker in workers)
    return {name: fault for name, fault in faults if fault is not None}


def _verdict(epoch: int, members: Sequence[WorkerHandle], ended: LlamaclustError | None) -> WorkerError | None:
    order = members[0].stages[epoch][0].group
    assert order is not None, "a group's members have its order"
    reports, leader = _reports(epoch, members), order.members[0].worker
    if ended is not None and ended.worker != leader and _is_among(ended.worker, members):
        # The leader's stream is no better a witness than its report.
        reports = {leader: GroupFault(epoch, str(ended.worker), "closed", str(ended)), **reports}
    if (fault := judge(reports, len(order.members))) is not None:
        return WorkerError(f"the group of worker {fault.worker} broke: {fault.reason}", worker=fault.worker)
    if (disputed := dispute(reports)) is None:
        return None
    name, fault = disputed
    answer = reports.get(fault.worker)
    is_mutual = answer is not None and answer.worker == name
    what = (
        "accuse each other" if is_mutual else f"disagree: {name} accuses {fault.worker}, which too few members confirm"
    )
    workers = " and ".join(sorted((name, fault.worker)))
    return DisputeError(f"workers {workers} of a group {what}: {fault.reason}", pair=frozenset((name, fault.worker)))


def _cut_members(epoch: int, workers: Sequence[WorkerHandle]) -> tuple[str, str] | None:
    for members in groups_of(epoch, workers):
        for member in members:
            other = member.unreachable_peer(epoch).name
            if other is not None and _is_among(other, members):
                return member.name, other
    return None


async def _is_cut_off(epoch: int, member: WorkerHandle, members: Sequence[WorkerHandle]) -> None:
    await member.unreachable_peer(epoch).reported.wait()
    if not _is_among(member.unreachable_peer(epoch).name, members):
        # A worker outside the group has the next stage. The caller of `has_failed` notices if its stream ends.
        await asyncio.Event().wait()


def _is_among(name: str | None, members: Sequence[WorkerHandle]) -> bool:
    return any(member.name == name for member in members)


async def _can_be_judged(epoch: int, members: Sequence[WorkerHandle]) -> bool:
    waiting = {asyncio.create_task(member.group_faults(epoch).reported.wait()) for member in members}
    names = {member.name for member in members}
    try:
        while True:
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            reports = _reports(epoch, members)
            late = {fault.worker for fault in reports.values() if fault.kind == "late"}
            cut_off = {member.name for member in members if member.unreachable_peer(epoch).reported.is_set()}
            has_failed_itself = any(fault.worker == name for name, fault in reports.items())
            if has_failed_itself or names <= reports.keys() | late | cut_off:
                return True
    finally:
        for task in waiting:
            task.cancel()


async def _is_partitioned(epoch: int, worker: WorkerHandle, workers: Sequence[WorkerHandle]) -> bool:
    unreachable = worker.unreachable_peer(epoch)
    await unreachable.reported.wait()
    peer = next((peer for peer in workers if peer.name == unreachable.name), None)
    return peer is None or await peer.is_responsive()
