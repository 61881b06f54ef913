"""Tests of workers that cannot reach each other: which reports are confirmed, how long partitions last and how they
end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from llamaclust.cluster.control import partitions
from llamaclust.cluster.control.partitions import PartitionTracker
from llamaclust.cluster.control.pool.closed_ports import ClosedPorts
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.links import Pairs
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.core.backoff import Backoff
from llamaclust.wire.control.messages import (
    CoordinatorMessage,
    Heartbeat,
    Loaded,
    PeerUnreachable,
    ProbePeer,
    ProbeResult,
)
from llamaclust.wire.security.credentials import Insecure
from support.wire.control_messages import LOAD, REGISTER

ALIVE = Heartbeat(0.0, 0, 0, 0, 0)
AB, BC = frozenset("ab"), frozenset("bc")


@dataclass
class Members:
    """Simulated workers a, b, ..., and the events that are reported."""

    cut: set[str] = field(default_factory=set)  # "ab": a does not reach b
    asked: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    changes: int = 0
    names: str = "abc"
    at_once: int = 0  # probes are answered once so many are sent

    def __post_init__(self) -> None:
        self.enough = asyncio.Event()
        self.workers = {name: self._worker(name) for name in self.names}
        self.tracker = PartitionTracker(
            self._present, 5.0, self._report, self._changed, ClosedPorts(self._report, lambda: None)
        )

    def _worker(self, name: str) -> WorkerHandle:
        async def say(message: CoordinatorMessage) -> None:
            assert isinstance(message, ProbePeer)
            self.asked.append(name + message.worker)
            way = name + message.worker
            if len(self.asked) >= self.at_once:
                self.enough.set()
            await self.enough.wait()
            self.workers[name].receive(
                ProbeResult(message.worker, "no answer" if way in self.cut else "", message.request_id)
            )

        worker = WorkerHandle(replace(REGISTER, name=name), say, lambda: "", Insecure())
        worker.stages[3] = (LOAD, Loaded(3, 1, 1, 1))
        return worker

    def _present(self) -> dict[str, WorkerHandle]:
        return {name: worker for name, worker in self.workers.items() if worker.loss is None}

    def _report(self, event: Event) -> None:
        assert isinstance(event, Notice)
        self.told.append(event.text)

    def _changed(self, pairs: Pairs) -> None:
        assert pairs == self.tracker.pairs
        self.changes += 1

    def says(self, caller: str, other: str) -> None:
        self.tracker.suspect(self.workers[caller], PeerUnreachable(3, other, "silence"))

    async def breaks(self, pair: str) -> None:
        """Cuts the first worker of the pair off from the second, which is alive."""
        self.cut.add(pair)
        self.says(*pair)
        await asyncio.sleep(0)
        self.workers[pair[1]].receive(ALIVE)
        await self.tracker.settled()

    async def until_apart(self, pairs: Pairs) -> None:
        end = asyncio.get_running_loop().time() + 5.0
        while self.tracker.pairs != pairs:
            assert asyncio.get_running_loop().time() < end, f"apart still: {self.tracker.pairs}"
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "_BACKOFF", Backoff(0.02, 120.0, factor=1.5))


async def test_only_who_is_alive_is_cut_off() -> None:
    members = Members()
    with members.tracker:
        members.says("a", "b")
        members.says("c", "b")
        await asyncio.sleep(0.01)
        assert not members.tracker.pairs
        members.workers["b"].lose("it was killed")
        await members.tracker.settled()
        assert not members.tracker.pairs and not members.told
        await members.breaks("ca")
        assert members.tracker.pairs == {frozenset("ac")} and members.changes == 1
        why = "workers c and a cannot reach each other: silence; plans do not make them neighbours until the link works"
        assert members.told == [why]


async def test_reports_about_unknown_workers_and_about_the_sender_are_ignored() -> None:
    members = Members()
    with members.tracker:
        members.says("a", "x")
        members.says("a", "a")
        await members.tracker.settled()
        assert not members.tracker.pairs


async def test_it_is_mended_when_each_reaches_the_other_that_did_not() -> None:
    members = Members()
    with members.tracker:
        await members.breaks("ab")
        await members.breaks("ba")
        await members.breaks("bc")
        assert members.tracker.pairs == {AB, BC} and len(members.told) == 2
        members.cut.discard("ab")
        members.cut.discard("bc")
        await members.until_apart(frozenset((AB,)))
        await asyncio.sleep(0.1)
        assert members.tracker.pairs == {AB}, "b does not reach a"
        members.cut.clear()
        await members.until_apart(frozenset())
        assert set(members.asked) >= {"ab", "ba", "bc"}
        assert members.told[-1] == "workers a and b reach each other again" and members.changes == 4


async def test_a_pair_that_breaks_again_is_tried_after_longer_pauses() -> None:
    members = Members()
    with members.tracker:
        pauses = []
        for _ in range(4):
            await members.breaks("ab")
            pauses.append(members.tracker._partitions[AB].probes)
            members.cut.clear()
            await members.until_apart(frozenset())
        assert pauses == sorted(set(pauses)), "each longer than the one before"
        await members.breaks("ab")
        before = members.asked.count("ab")
        await asyncio.sleep(0.5)
        tries = members.asked.count("ab") - before
        assert 1 <= tries <= 5, "pauses grow while it is cut"


async def test_a_worker_that_is_lost_takes_its_cuts_with_it() -> None:
    members = Members()
    with members.tracker:
        await members.breaks("ab")
        await members.breaks("bc")
        members.workers["a"].lose("it was killed")
        members.tracker.forget("a")
        assert members.tracker.pairs == {BC}
        members.cut.clear()
        members.asked.clear()
        await members.until_apart(frozenset())
        assert members.asked == ["bc"]


async def test_a_network_that_falls_apart_in_two_is_known_after_one_report() -> None:
    """All links are probed at once, so the first plan after that works."""
    sides = {one + other for one in "ab" for other in "cd"}
    members = Members(cut=sides | {way[::-1] for way in sides}, names="abcd", at_once=10)

    async def live() -> None:
        while True:
            for worker in members.workers.values():
                worker.receive(ALIVE)
            await asyncio.sleep(0.001)

    with members.tracker:
        living = asyncio.create_task(live())
        members.says("b", "c")
        async with asyncio.timeout(60):
            await members.tracker.settled()
        living.cancel()
        assert members.tracker.pairs == {frozenset(way) for way in sides}
        assert len(members.told) == 4 and len(set(members.asked)) == 10


async def test_of_many_workers_those_are_tried_that_are_known_to_be_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "_MAX_PROBES", 5)
    members = Members(cut={"ab"}, names="abcd")
    with members.tracker:
        members.tracker._healed[AB] = (0.0, 20)  # delays its next probe
        await members.breaks("ab")
        assert sorted(members.asked) == ["ac", "ad", "bc", "bd", "ca", "cb", "da", "db"]


async def test_what_a_stage_says_of_an_epoch_ends_with_it() -> None:
    worker = Members().workers["a"]
    worker.receive(PeerUnreachable(2, "b", "late"))
    worker.receive(PeerUnreachable(3, "b", "silence"))
    assert not worker.unreachable_peer(2).reported.is_set() and worker.unreachable_peer(3).reported.is_set()


async def test_reports_without_end_do_not_delay_settling() -> None:
    members = Members(cut={"ab"})  # it must not heal, however slow the machine is

    async def say_it() -> None:
        while True:
            members.says("a", "b")
            members.workers["b"].receive(ALIVE)
            await asyncio.sleep(0)

    with members.tracker:
        lies = asyncio.create_task(say_it())
        await asyncio.sleep(0.01)
        async with asyncio.timeout(60):
            await members.tracker.settled()
        lies.cancel()
    assert members.tracker.pairs == {AB} and members.changes == 1


async def test_a_report_that_is_looked_into_is_not_looked_into_again() -> None:
    members = Members()
    with members.tracker:
        before = len(asyncio.all_tasks())
        for _ in range(1000):
            members.says("a", "b")
        assert len(asyncio.all_tasks()) == before + 1
