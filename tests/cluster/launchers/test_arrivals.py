"""Tests of a start: it waits for all its workers for a while, then for enough to hold the model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from llamaclust.cluster.launchers.arrivals import Arrivals, Awaited
from llamaclust.cluster.membership.members import Members
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.state.events import Event, Notice, Waiting, WorkerJoined
from llamaclust.core.errors import DeadlineError, InsufficientMemoryError, LlamaclustError, WorkerError
from llamaclust.wire.control.messages import CoordinatorMessage
from llamaclust.wire.security.credentials import Insecure
from support.event_loop import pass_time
from support.wire.control_messages import REGISTER

SHORT = InsufficientMemoryError("12 MiB are missing")
ABC = Awaited(("a", "b", "c"), 3, grace_s=0.05, wait_s=30.0)


@dataclass
class Start:
    """A start of workers a, b and c, of which `enough` can hold the model."""

    enough: int
    awaited: Awaited = ABC
    registry: Members = field(default_factory=lambda: Members(lambda *_: ""))
    events: list[Event] = field(default_factory=list)
    asked: int = 0
    drained: tuple[str, ...] = ()

    def join(self, *names: str) -> None:
        async def nothing(_: CoordinatorMessage) -> None: ...

        for name in names:
            handle = WorkerHandle(replace(REGISTER, name=name), nothing, lambda: "", Insecure())
            self.registry.admit(handle)
            self.registry.announce(handle)

    async def shortfall(self, with_drained: bool) -> LlamaclustError | None:
        self.asked += 1
        present = [name for name in self.registry.present if with_drained or name not in self.drained]
        return None if len(present) >= self.enough else SHORT

    def wait(self) -> asyncio.Task[None]:
        return asyncio.create_task(
            Arrivals(self.awaited, self.registry, self.shortfall, self.events.append).wait()  # type: ignore[arg-type]
        )

    async def reported(self, kind: type[Event]) -> Event:
        async with asyncio.timeout(60):
            while not (found := [event for event in self.events if isinstance(event, kind)]):  # noqa: ASYNC110  a list
                await asyncio.sleep(0.005)
        return found[-1]


async def test_a_whole_start_waits_for_nothing_and_is_not_planned_twice() -> None:
    start = Start(enough=1, awaited=replace(ABC, grace_s=3600.0))
    waiting = start.wait()
    start.join("b", "a", "c")
    async with asyncio.timeout(60):
        await waiting
    assert start.asked == 0
    joined = [event for event in start.events if isinstance(event, WorkerJoined)]
    assert [(event.worker, event.missing) for event in joined] == [
        ("b", ("worker a", "worker c")),
        ("a", ("worker c",)),
        ("c", ()),
    ]


async def test_a_start_goes_on_after_a_grace_with_those_that_suffice() -> None:
    start = Start(enough=2)
    waiting = start.wait()
    start.join("a", "c")
    async with asyncio.timeout(60):
        await waiting
    assert start.events[-1] == Notice("the start continues with 2 of 3 workers, without worker b")


async def test_a_start_waits_on_where_those_that_are_here_do_not_suffice_and_says_why() -> None:
    start = Start(enough=2)
    waiting = start.wait()
    start.join("a")
    why = await start.reported(Waiting)
    assert why == Waiting("worker b, worker c, because the present workers do not suffice: 12 MiB are missing")
    assert not waiting.done()
    start.join("c")
    async with asyncio.timeout(60):
        await waiting
    assert start.asked == 2, "once for each set of workers"


async def test_a_worker_that_is_lost_while_others_are_awaited_is_reported() -> None:
    start = Start(enough=3, awaited=Awaited((), 3, grace_s=3600.0, wait_s=30.0))
    waiting = start.wait()
    start.join("a", "b")
    await start.reported(WorkerJoined)
    start.registry.report_loss(start.registry.workers["b"], "its connection closed")
    lost = await start.reported(Waiting)
    assert lost == Waiting("2 more workers; worker b is lost: its connection closed")
    start.join("b", "c")
    async with asyncio.timeout(60):
        await waiting


async def test_a_start_that_waits_in_vain_names_the_missing_workers_and_the_shortfall() -> None:
    start = Start(enough=2, awaited=replace(ABC, wait_s=0.3))
    waiting = start.wait()
    start.join("a")
    says = r"did not join within 0.3 s \(`join.wait`\): worker b, worker c; 1 joined, which is not enough: 12 MiB"
    with pytest.raises(DeadlineError, match=says):
        await waiting


async def test_a_start_uses_drained_workers_only_after_it_waited_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Start(enough=2, awaited=replace(ABC, wait_s=3600.0), drained=("c",))
    waiting = start.wait()
    start.join("a", "c")
    await start.reported(Waiting)
    pass_time(monkeypatch, 3600.0)
    async with asyncio.timeout(60):
        await waiting
    assert start.asked == 2
    assert start.events[-1] == Notice("the start continues with 2 of 3 workers, without worker b")


async def test_a_worker_that_ended_before_it_joined_ends_the_start() -> None:
    start = Start(enough=2)
    waiting = start.wait()
    start.join("a")
    start.registry.process_exited("b", "exited with status 2")
    with pytest.raises(WorkerError, match="worker b did not start: exited with status 2"):
        await waiting


async def test_a_worker_that_joined_and_ended_ends_the_start() -> None:
    start = Start(enough=2)
    waiting = start.wait()
    start.join("a")
    await start.reported(WorkerJoined)
    start.registry.process_exited("a", "killed by SIGKILL")
    with pytest.raises(WorkerError, match="worker a did not start: killed by SIGKILL"):
        await waiting


def test_names_and_further_workers_that_are_missing() -> None:
    assert Awaited((), 2, 1.0, 1.0).missing(()) == ["2 more workers"]
    assert Awaited((), 2, 1.0, 1.0).missing(("x", "y", "z")) == []
    planned = Awaited(("x",), 3, 1.0, 1.0)
    assert planned.missing(()) == ["worker x", "2 more workers"]
    assert planned.missing(("y", "z")) == ["worker x"]
