"""Tests of reports by members that cannot open their links: which port is closed, for whom, and until when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from llamaclust.cluster.control.pool import closed_ports
from llamaclust.cluster.control.pool.closed_ports import ClosedPorts
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.core.backoff import Backoff
from llamaclust.wire.control.groups import GroupCounters, GroupMember, GroupOrder
from llamaclust.wire.control.messages import (
    CoordinatorMessage,
    Failure,
    Heartbeat,
    Loaded,
    RequestFailed,
    StageProgress,
)
from llamaclust.wire.control.profiles import LinkProfile, LinkProfiles, ProfileLinks
from llamaclust.wire.security.credentials import Insecure
from support.wire.control_messages import LOAD, REGISTER

EPOCH = 3
NAMES = "abc"
OPEN = StageProgress(EPOCH, 0, 0, group=GroupCounters())


@dataclass
class Members:
    """Simulated workers of a group whose links are being opened."""

    closed: set[str] = field(default_factory=set)  # "ab": a cannot connect to b's port for links
    cut: set[str] = field(default_factory=set)  # "ab": a does not reach b at all
    told: list[str] = field(default_factory=list)
    changes: int = 0
    looks: int = 0

    def __post_init__(self) -> None:
        self.workers = {name: self._worker(name) for name in NAMES}
        self.ports = ClosedPorts(lambda event: self.told.append(text_of(event)), self._changed)

    def _worker(self, name: str) -> WorkerHandle:
        async def say(message: CoordinatorMessage) -> None:
            assert isinstance(message, ProfileLinks)
            self.looks += 1
            way, number = name + message.ends[0].worker, message.request_id
            network_s = None if way in self.closed else 1e-5
            found = LinkProfiles((LinkProfile(1e-4, 1e9, network_s),), number)
            failed = RequestFailed(Failure("WorkerError", "no answer"), number)
            self.workers[name].receive(failed if way in self.cut else found)

        own = replace(REGISTER, name=name, link_address=f"192.0.2.1:{8100 + NAMES.index(name)}")
        worker = WorkerHandle(own, say, lambda: "", Insecure())
        members = tuple(GroupMember(each, "192.0.2.1:1", 1) for each in NAMES)
        order = replace(LOAD, group=GroupOrder(bytes(16), members, NAMES.index(name)))
        worker.stages[EPOCH] = (order, Loaded(EPOCH, 1, 1, 1))
        return worker

    def _changed(self) -> None:
        self.changes += 1

    async def reports(self, way: str, epoch: int = EPOCH) -> bool:
        caller, other = (self.workers[name] for name in way)
        return await self.ports.is_found(caller, other, epoch)

    async def until(self, happens: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not happens():  # noqa: ASYNC110  counted by other tasks
                await asyncio.sleep(0.001)


def text_of(event: Event) -> str:
    assert isinstance(event, Notice)
    return event.text


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_ports, "_BACKOFF", Backoff(0.001, 0.01))


async def test_a_closed_port_is_told_once_and_again_when_it_is_open() -> None:
    members = Members(closed={"ba", "ca"})
    assert await members.reports("ba") and await members.reports("ca") and await members.reports("ba")
    assert members.told == [
        "worker b cannot connect to worker a at 192.0.2.1:8100, its port for group links: open this port in firewalls;"
        " until then, plans put worker a in no group"
    ]
    assert members.changes == 1 and members.workers["a"].closed_port and not members.workers["b"].closed_port
    before = members.looks
    await members.until(lambda: members.looks > before + 6)
    members.closed.discard("ba")
    before = members.looks
    await members.until(lambda: members.looks > before + 6)
    assert members.changes == 1, "it is still closed for c"
    members.closed.clear()
    await members.until(lambda: members.changes == 2)
    assert members.told[1:] == ["the port for group links of worker a is open again"]
    assert not members.workers["a"].closed_port
    members.closed.add("ba")
    assert await members.reports("ba") and members.changes == 3
    members.ports.cancel()


@pytest.mark.parametrize("why", ["it is open", "nothing reaches the worker", "another epoch", "links are open", "lost"])
async def test_other_reports_are_of_partitions(why: str) -> None:
    members = Members(closed=set() if why == "it is open" else {"ba"})
    if why == "nothing reaches the worker":
        members.cut.add("ba")
    elif why == "links are open":
        members.workers["b"].receive(Heartbeat(0.0, 0, 0, 0, 0, stages=(OPEN,)))
    elif why == "lost":
        members.workers["b"].lose("it was killed")
    assert not await members.reports("ba", EPOCH + (why == "another epoch"))
    assert members.told == [] and members.changes == 0


async def test_a_worker_that_joins_again_may_have_another_port() -> None:
    members = Members(closed={"ba"})
    assert await members.reports("ba")
    members.workers["a"].lose("it was killed")
    await members.until(lambda: not members.workers["a"].closed_port)
    assert len(members.told) == 1 and members.changes == 1
