"""Finds workers whose port for group links is closed by a firewall, although their main port can be reached."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.membership.worker_requests import profile_link
from llamaclust.cluster.state.events import Notice, Report
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import LlamaclustError
from llamaclust.wire.rpc.task_set import TaskSet

_BACKOFF = Backoff(first_s=1.0, max_s=120.0, factor=1.5)


@dataclass(slots=True, eq=False)
class ClosedPorts:
    _report: Report
    _on_change: Callable[[], None]
    # For each worker with a closed port, the group members that cannot connect to this port.
    _callers: dict[WorkerHandle, set[WorkerHandle]] = field(default_factory=dict, init=False)
    _tasks: TaskSet = field(default_factory=TaskSet, init=False)

    def cancel(self) -> None:
        self._tasks.cancel()

    async def is_found(self, caller: WorkerHandle, other: WorkerHandle, epoch: int) -> bool:
        if not _opens_links(caller, other, epoch) or await _connects(caller, other) is not False:
            return False
        callers = self._callers.setdefault(other, set())
        callers.add(caller)
        if not other.closed_port:
            place = f"worker {other.name} at {other.registration.link_address}, its port for group links"
            other.closed_port = f"worker {caller.name} cannot connect to {place}: open this port in firewalls"
            self._report(Notice(f"{other.closed_port}; until then, plans put worker {other.name} in no group"))
            self._tasks.start(self._until_open(other, callers))
            self._on_change()
        return True

    async def _until_open(self, worker: WorkerHandle, callers: set[WorkerHandle]) -> None:
        for probes in count():
            await asyncio.sleep(_BACKOFF.pause_s(probes))
            for caller in tuple(callers):
                if caller.loss is not None or await _connects(caller, worker):
                    callers.discard(caller)
            if not callers or worker.loss is not None:
                break
        del self._callers[worker]
        worker.closed_port = ""
        if worker.loss is None:
            self._report(Notice(f"the port for group links of worker {worker.name} is open again"))
            self._on_change()


def _opens_links(caller: WorkerHandle, other: WorkerHandle, epoch: int) -> bool:
    order, _ = caller.stages.get(epoch, (None, None))
    if order is None or order.group is None:
        return False
    progress = caller.progress(epoch)
    is_member = any(member.worker == other.name for member in order.group.members)
    return is_member and (progress is None or progress.group is None)


async def _connects(caller: WorkerHandle, other: WorkerHandle) -> bool | None:
    """Returns True if `other` accepts connections to its port for group links, False if only this port is closed, and
    None if `other` cannot be reached at all."""
    try:
        return (await profile_link(caller, other)).network_s is not None
    except LlamaclustError:
        return None
