"""Tests of a group member whose links cannot be opened or whose last step does not end: it reports this and leaks
nothing."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control.remote import pipeline
from llamaclust.core.errors import DeadlineError, DeviceLostError, WorkerError
from llamaclust.core.limits import GROUP_ID_BYTES
from llamaclust.kernels.backend import CacheCounts
from llamaclust.wire.control.groups import GroupFault, GroupMember, GroupOrder
from llamaclust.wire.control.messages import Deadlines, LoadFailed, PeerUnreachable, WorkerMessage
from llamaclust.wire.security.credentials import Insecure
from llamaclust.wire.security.token import ClusterToken
from llamaclust.worker import loads
from llamaclust.worker.groups.link_opener import LinkOpener, MemberLostError
from llamaclust.worker.groups.listener import LinkListener
from llamaclust.worker.groups.member_links import Fault, MemberLinks
from llamaclust.worker.loads import Loads
from llamaclust.worker.service import StageService
from llamaclust.worker.session import Session
from llamaclust.worker.stage import following, streams
from llamaclust.worker.stage.compute import Compute
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.stage.following import FollowingStage
from llamaclust.worker.stage.leading import Leader
from llamaclust.worker.stage.streams import Neighbours, StageStreams
from llamaclust.worker.worker import Worker
from support.clusters.served import until
from support.wire.control_messages import LOAD

MEMBERS = GroupMember("a", "192.0.2.1:7000"), GroupMember("b", "unix:/b")
ORDER = GroupOrder(bytes(GROUP_ID_BYTES), MEMBERS, 1)


@pytest.mark.parametrize("fails", ["its links", "as a follower", "as the leader", "nothing"])
async def test_what_a_load_cannot_serve_is_known_before_it_or_freed(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another member's address does not fit these credentials, or the loaded stage cannot begin."""
    told: list[WorkerMessage] = []
    loaded: list[str] = []

    async def send(message: WorkerMessage) -> None:
        told.append(message)

    async def load_stage(*_: object) -> object:
        loaded.append("loaded")
        memory = SimpleNamespace(weight_bytes=1, kv_bytes=2, workspace_bytes=3)
        portion = SimpleNamespace(leads=fails == "as the leader")
        return SimpleNamespace(
            memory=memory,
            portion=portion,
            gather_by=None,
            close=lambda: loaded.append("freed"),
            model_id="m",
            samples=False,
        )

    class Failing:
        def __init__(self, *_: object) -> None:
            if fails != "nothing":
                raise RuntimeError("it cannot begin")
            self.epoch = 3

    monkeypatch.setattr(loads, "load_stage", load_stage)
    monkeypatch.setattr(loads, "FollowingStage", Failing)
    monkeypatch.setattr(loads, "StageStreams", Failing)
    anything: Any = SimpleNamespace(received_bytes=0, see=lambda _: None)
    compute, service = Compute(), StageService("a")
    worker = Worker("a", anything, service, compute, anything, anything, links=LinkListener(), terms=anything)
    credentials = ClusterToken("t" * 40) if fails == "its links" else Insecure()
    monkeypatch.setattr(loads, "Leader", lambda *_: None)
    member = Loads(Session(worker, credentials, Deadlines(), Counters(), send))
    await member.load(replace(LOAD, epoch=3, group=ORDER, exclusive=False))
    compute.close()
    if fails == "nothing":
        assert loaded == ["loaded"] and 3 in service
        return
    (answer,) = told
    assert isinstance(answer, LoadFailed) and 3 not in service
    assert loaded == ([] if fails == "its links" else ["loaded", "freed"])


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError("can't start new thread"), ("b", "failed", "RuntimeError: can't start new thread")),
        (OSError(24, "Too many open files"), ("b", "failed", "OSError: [Errno 24] Too many open files")),
        (MemberLostError("a link to a: not in time", worker="a"), ("a", "late", "a link to a: not in time")),
    ],
)
async def test_a_member_that_cannot_open_its_links_reports_that_once(
    error: Exception, fault: tuple[str, str, str]
) -> None:
    """Nobody waits for the links of a member that does not lead."""
    reports: list[Fault] = []
    reported = asyncio.Event()

    async def report(found: Fault) -> None:
        reports.append(found)
        reported.set()

    async def fails(*_: float) -> None:
        raise error

    group: Any = SimpleNamespace(open=fails, unreached=lambda _: [])
    links = MemberLinks(3, ORDER, group, Deadlines(), report)
    links.open(lambda _: None)
    async with asyncio.timeout(60):
        await reported.wait()
        with pytest.raises(type(error)):
            await links.opened(20.0)
    assert reports == [GroupFault(3, *fault)]


async def test_links_that_are_made_and_not_yet_open_in_time_are_late() -> None:
    async def nothing(_: Fault) -> None: ...

    group = LinkOpener(ORDER, Insecure(), LinkListener())
    links = MemberLinks(3, ORDER, group, Deadlines(), nothing)
    links.open(lambda _: None)
    group._linked.add(0)
    with pytest.raises(DeadlineError, match="the links of a group"):
        await links.opened(0.0)
    links.close()


async def test_a_step_that_does_not_end_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker no longer lists the stage, which keeps its memory."""
    given_up: list[DeviceLostError] = []
    monkeypatch.setattr(following, "_STEP_S", 0.01)
    limits, program = SimpleNamespace(max_batch_tokens=1), SimpleNamespace(is_first=True)
    runner: Any = SimpleNamespace(limits=limits, program=program, experts_cache=CacheCounts())
    links: Any = SimpleNamespace(open=lambda _: None, close=lambda: None)
    service = StageService("b")
    stage = FollowingStage(3, runner, Counters(), links, given_up.append)
    stage._ended = asyncio.get_running_loop().create_future()
    service.add(stage)
    with pytest.raises(DeviceLostError, match=r"the end of a group's step took longer than 0\.01 s") as caught:
        await service.remove(3)
    assert given_up == [caught.value]


@pytest.mark.parametrize("member", [0, 1])
async def test_a_kept_member_tries_no_longer_to_open_its_links(member: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator disconnects before the other member has started. The leader accepts, the follower connects."""
    attempts: list[str] = []

    async def refused(_: LinkOpener, address: str) -> None:
        attempts.append(address)
        raise OSError("nobody is there")

    async def nothing(_: Fault) -> None: ...

    monkeypatch.setattr(LinkOpener, "_connection_to", refused)
    monkeypatch.setattr(streams, "StageLoop", lambda *_: None)
    limits, program = SimpleNamespace(max_batch_tokens=1), SimpleNamespace(is_first=True)
    runner: Any = SimpleNamespace(limits=limits, program=program, gather_by=None)
    members = GroupMember("a", "127.0.0.1:7000"), GroupMember("b", "127.0.0.1:7001")
    order, service = replace(ORDER, members=members, member=member), StageService("ab"[member])
    links = MemberLinks(3, order, LinkOpener(order, Insecure(), LinkListener()), Deadlines(), nothing)
    if member == 0:
        context: Any = SimpleNamespace(compute=None, leader=Leader(3, links, runner.gather_by))
        neighbours = Neighbours(lambda *_: asyncio.sleep(0))
        service.add(StageStreams(3, runner, context, Deadlines(), neighbours, links))
    else:
        service.add(FollowingStage(3, runner, Counters(), links, lambda _: None))
    async with asyncio.timeout(60):
        await until(lambda: len(attempts) > 1 or (member == 0 and len(asyncio.all_tasks()) > 2))
        service.keep()
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_a_leader_names_a_missing_member_before_others_give_up_the_leader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []

    async def opened(seconds: float) -> None:
        waited.append(seconds)
        raise WorkerError("worker b: no answer", worker="b")

    monkeypatch.setattr(streams, "StageLoop", lambda *_: None)
    runner: Any = SimpleNamespace(limits=None, program=None, gather_by=None)
    links: Any = SimpleNamespace(open=lambda _: None, opened=opened, close=lambda: None)
    context: Any = SimpleNamespace(compute=None, leader=Leader(3, links, runner.gather_by))
    neighbours = Neighbours(lambda *_: asyncio.sleep(0))
    stage, stream = StageStreams(3, runner, context, Deadlines(), neighbours, links), SimpleNamespace(peer=None)
    with pytest.raises(WorkerError, match="worker b: no answer"):
        await stage.forward(stream)  # type: ignore[arg-type]
    assert len(waited) == 1 and 0 < waited[0] < min(Deadlines().forward_s, pipeline._OPEN_S)


@pytest.mark.parametrize(
    ("fault", "line", "is_error"),
    [
        (GroupFault(3, "a", "closed", "worker a: the other side has closed the connection"), "", False),
        (GroupFault(3, "c", "late", "worker c: no answer within 2.5 s"), "", False),
        (PeerUnreachable(3, "a", "Connection refused"), "worker a: Connection refused", False),
        (GroupFault(3, "b", "failed", "no memory"), "worker b: no memory", True),
    ],
)
async def test_only_its_own_failure_is_the_last_error_of_a_worker(
    fault: Fault, line: str, is_error: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Other failures are also reported to the coordinator; a link closed at a normal end is no error."""
    told: list[WorkerMessage] = []

    async def send(message: WorkerMessage) -> None:
        told.append(message)

    caplog.set_level(logging.INFO)
    anything: Any = None
    worker = Worker("b", anything, anything, anything, anything, anything)
    await Loads(Session(worker, Insecure(), Deadlines(), Counters(), send))._report(fault)
    assert told == [fault]
    (record,) = caplog.records
    assert record.getMessage() == f"epoch 0.3: {line or fault.reason}"
    assert (record.levelno >= logging.WARNING) == is_error


async def test_waits_in_steps_of_one_row_are_counted_apart() -> None:
    async def nothing(_: Fault) -> None: ...

    counters = SimpleNamespace(gathers=0, waited_s=0.0, waited_for_s=[0.0, 0.0], sent_bytes=0, received_bytes=0)

    async def opened(*_: float) -> object:
        return SimpleNamespace(counters=lambda: counters)

    group: Any = SimpleNamespace(open=opened, unreached=lambda _: [])
    links = MemberLinks(3, ORDER, group, Deadlines(), nothing)
    assert links.counters is None
    links.open(lambda _: None)
    await links.opened(60.0)
    for rows, waited_s in ((30, 4.0), (1, 0.5), (2, 2.0), (1, 0.25)):
        with links.step(rows):
            counters.waited_s += waited_s
    assert links.counters is not None
    assert (links.counters.waited_s, links.counters.one_row_steps, links.counters.one_row_waited_s) == (6.75, 2, 0.75)
