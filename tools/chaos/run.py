"""Tests a running cluster: applies load, injects faults, and compares answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llamaclust.cluster.client.http import AsyncClient
from llamaclust.cluster.client.operations import ClusterApi
from llamaclust.cluster.state.api_keys import first_key
from llamaclust.cluster.state.clusters import find_running
from llamaclust.cluster.state.directory import ClusterRecord
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.core.sizes import counted
from llamaclust.tools.chaos.firewall import Firewall, FirewallError
from llamaclust.tools.chaos.injector import Injector
from llamaclust.tools.chaos.load import Streams, fitting_requests, meanwhile
from llamaclust.tools.chaos.received import Received
from llamaclust.tools.chaos.schedule import FaultKind, Schedule
from llamaclust.tools.chaos.tally import Tally
from llamaclust.tools.chaos.targets import Permissions, Targets, find_targets
from llamaclust.tools.chaos.worker_faults import PRELOAD

_SHOW_S = 1.0
_FINISH_S = 180.0
"""Maximum number of seconds to wait for the last answers after the last fault."""
_NOT_HERE = "has no coordinator of this user on this machine"
_LINK = "a network link to this machine (workers of `launcher: local` have Unix sockets)"
_NOT_PRELOADED = f"needs two connected workers, one of them on this machine and started with PYTHONPATH={PRELOAD}"
_IMPOSSIBLE = {
    FaultKind.KILL: "restarts no workers on this machine; give --kill-joined if another program restarts them",
    FaultKind.STOP: "needs two connected workers, one of them on this machine",
    FaultKind.DRAIN: "needs two connected workers",
    FaultKind.COORDINATOR_KILL: (
        "has no standby (`llamaclust up FILE --standby`); give --coordinator if another program restarts it"
    ),
    FaultKind.COORDINATOR_STOP: _NOT_HERE,
    FaultKind.DISK_FULL: _NOT_HERE,
    FaultKind.PARTITION: f"needs two connected workers, one of them with {_LINK}",
    FaultKind.SLOW_LINK: f"has no worker with {_LINK}",
    FaultKind.FAILS: _NOT_PRELOADED,
    FaultKind.MUTE: _NOT_PRELOADED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosSettings:
    state_dir: Path
    cluster: str | None  # None for the only running cluster.
    seed: int
    duration_s: float
    streams: int
    permissions: Permissions
    required: frozenset[FaultKind]  # If one of these kinds is not possible, the test does not start.
    with_other_requests: bool  # True if requests of other clients may be disturbed.


class View(Protocol):
    def line(self, text: str) -> None: ...

    def progress(self, text: str) -> None: ...


async def run_chaos(settings: ChaosSettings, tally: Tally, view: View) -> None:
    """Runs the test and fills the tally. Always undoes lasting faults. Raises UsageError if no fault is possible."""
    folder, record = find_running(settings.state_dir, settings.cluster)
    status, context_tokens = _idle_status(settings, record)
    targets = find_targets(record, status, settings.permissions, has_standby=folder.has_standby)
    with _firewall(settings, targets, view) as firewall:
        injector = Injector(settings.state_dir, record.name, settings.permissions, view.line, firewall)
        _announce(settings, record.name, injector.targets(), view)
        key = None if record.api_keys_file is None else first_key(Path(record.api_keys_file))
        async with AsyncClient(record.api, key) as client:
            streams = Streams(client, await fitting_requests(client, context_tokens), tally)
            await _disturb_and_compare(settings, injector, streams, view)


async def _disturb_and_compare(settings: ChaosSettings, injector: Injector, streams: Streams, view: View) -> None:
    view.progress(f"taking {counted(settings.streams, 'undisturbed answer')}")
    await streams.undisturbed(settings.streams)
    try:
        async with _load(streams):
            try:
                await _disturb(settings, injector, streams, view)
            finally:
                injector.close()
                view.progress("waiting for the last answers")
    finally:
        injector.close()


def _idle_status(settings: ChaosSettings, record: ClusterRecord) -> tuple[dict[str, Any], int]:
    with ClusterApi.of(record) as api:
        status, context_tokens = api.status(), api.context_length()
    busy = status["requests"]["running"] + status["requests"]["waiting"]
    if busy and not settings.with_other_requests:
        raise UsageError(
            f"{record.name} serves {counted(busy, 'request')} of other clients; add --yes to disturb them, too"
        )
    return status, context_tokens


@contextmanager
def _firewall(settings: ChaosSettings, targets: Targets, view: View) -> Iterator[Firewall | None]:
    kinds = [kind for kind in FaultKind if kind.is_of_link and targets.names[kind]]
    try:
        firewall = Firewall() if kinds else None
    except FirewallError as error:
        if required := [kind.option for kind in kinds if kind in settings.required]:
            raise UsageError(f"--faults {required[0]}: {error}") from None
        view.line(f"no {', no '.join(kind.option for kind in kinds)}: {error}")
        firewall = None
    try:
        yield firewall
    finally:
        if firewall is not None:
            firewall.close()


def _announce(settings: ChaosSettings, cluster: str, targets: Targets, view: View) -> None:
    kinds = [kind for kind in FaultKind if _suffices(kind, targets)]
    for kind in FaultKind:
        if kind in settings.required and kind not in kinds:
            raise UsageError(f"--faults {kind.option}: {cluster} {_IMPOSSIBLE[kind]}")
    if not kinds:
        raise UsageError(f"{cluster}: none of the faults can be injected from this machine")
    streams = counted(settings.streams, "stream")
    view.line(f"{cluster}: {settings.duration_s / 60:g} min of faults under {streams}, seed {settings.seed}:")
    view.line("  " + "; ".join(f"{kind.value} ({', '.join(targets.names[kind])})" for kind in kinds))


def _suffices(kind: FaultKind, targets: Targets) -> bool:
    least = 2 if kind.needs_another_worker else 1
    return len(targets.names[kind]) >= 1 and len(targets.connected) >= least


@asynccontextmanager
async def _load(streams: Streams) -> AsyncIterator[None]:
    """Repeats requests until the context ends, and then waits until the running requests have finished."""
    done = asyncio.Event()
    async with meanwhile(streams.repeat(number, done) for number in streams.expected) as tasks:
        yield
        done.set()
        await asyncio.wait(tasks, timeout=_FINISH_S)
        for task, expected in zip(tasks, streams.expected.values(), strict=True):
            if not task.done():
                streams.tally.errors[f"no end within {_FINISH_S:.0f} s of the last fault"] += 1
                streams.tally.compared.add_request(expected, Received())


async def _disturb(settings: ChaosSettings, injector: Injector, streams: Streams, view: View) -> None:
    schedule, begun_s = Schedule(settings.seed), time.monotonic()
    end_s = begun_s + settings.duration_s
    showing = asyncio.create_task(_show_progress(streams, end_s, view))
    try:
        while (left_s := end_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, schedule.pause_s()))
            if time.monotonic() < end_s:
                await _one_fault(schedule, injector, streams.tally, begun_s, view)
    finally:
        showing.cancel()


async def _one_fault(schedule: Schedule, injector: Injector, tally: Tally, begun_s: float, view: View) -> None:
    try:
        targets = await asyncio.to_thread(injector.targets)
    except LlamaclustError as error:
        view.line(f"no fault, because the cluster's status is unknown: {error}")
        return
    now_s = time.monotonic()
    fault = schedule.next_fault(now_s, targets.names, targets.connected, injector.held)
    if fault is None:
        return
    tally.pauses.fault(fault.kind, now_s)
    view.line(f"{now_s - begun_s:7.2f} s: {fault}")
    if await injector.inject(fault, targets):
        tally.faults[fault.kind] += 1


async def _show_progress(streams: Streams, end_s: float, view: View) -> None:
    before, tally = streams.received, streams.tally
    while True:
        await asyncio.sleep(_SHOW_S)
        rate, before = (streams.received - before) / _SHOW_S, streams.received
        answers, faults = counted(tally.compared.answers, "answer"), counted(tally.faults.total(), "fault")
        wrong, left_s = counted(tally.compared.lost + tally.compared.changed, "token"), end_s - time.monotonic()
        view.progress(f"{rate:.0f} tok/s, {answers}, {faults}, {wrong} wrong, {max(0.0, left_s):.0f} s left")
