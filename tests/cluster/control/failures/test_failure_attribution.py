"""Tests which worker is named when a pipeline breaks or cannot be opened, for reports in any order and at any time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.control.failures import failure_attribution
from llamaclust.cluster.control.failures.failure_attribution import (
    _can_be_judged,
    attribute_failure,
    root_cause,
)
from llamaclust.cluster.control.remote.pipeline import RemotePipeline
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.errors import DisputeError, ProtocolError, WorkerError
from llamaclust.core.limits import GROUP_ID_BYTES
from llamaclust.wire.control.codec import encode_coordinator_message
from llamaclust.wire.control.groups import FAULTS, GroupFault, GroupMember, GroupOrder
from llamaclust.wire.control.messages import (
    Admitted,
    CoordinatorMessage,
    Deadlines,
    Heartbeat,
    Loaded,
    PeerUnreachable,
    RenewCertificate,
    Shutdown,
    WorkerMessage,
)
from llamaclust.wire.rpc.client import Peer, StreamBrokenError
from llamaclust.wire.rpc.methods import ECHO, JOIN
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.wire.security.credentials import Insecure
from llamaclust.worker.loads import Loads
from llamaclust.worker.membership import Member
from llamaclust.worker.readiness import Readiness
from llamaclust.worker.session import Session
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.worker import Worker
from support.clusters.real_cluster import real_cluster
from support.clusters.served import until
from support.models.tiny_model import build_tiny_model
from support.wire.control_messages import LOAD, REGISTER

ALIVE = Heartbeat(0.0, 0, 0, 0, 0)
INSECURE = Insecure()


async def _nothing(message: CoordinatorMessage) -> None: ...


def three() -> dict[str, WorkerHandle]:
    """Workers a, b and c that hold stages of epoch 3."""
    workers = {name: WorkerHandle(replace(REGISTER, name=name), _nothing, lambda: "", Insecure()) for name in "abc"}
    for worker in workers.values():
        worker.stages[3] = (LOAD, Loaded(3, 1, 1, 1))
    return workers


async def test_the_cause_is_whom_others_could_not_reach_then_who_was_lost_first() -> None:
    workers = three()
    everyone = list(workers.values())
    workers["b"].lose("killed")
    workers["a"].lose("it ended, too")
    assert root_cause(3, everyone) is workers["b"]
    workers = three()
    everyone = list(workers.values())
    workers["a"].receive(PeerUnreachable(3, "b", "Socket closed"))
    workers["a"].lose("its process ended with exit code 0")
    workers["b"].lose("killed")
    assert root_cause(3, everyone) is workers["b"]


async def test_a_loss_is_waited_for_where_others_tell_of_it_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_attribution, "_ATTRIBUTION_S", 20.0)
    workers = three()
    everyone = list(workers.values())
    workers["b"].receive(PeerUnreachable(3, "c", "Socket closed"))
    asking = asyncio.create_task(attribute_failure(3, everyone, WorkerError("the first stage ended its stream")))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not asking.done(), "c may have ended"
    workers["c"].lose("its process was killed by signal 9")
    error = await asking
    assert str(error).startswith("worker c (layers [2, 4)) is lost: its process was killed") and error.worker == "c"


async def test_unreachable_live_worker_is_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_attribution, "_ATTRIBUTION_S", 20.0)
    workers = three()
    asking = asyncio.create_task(
        attribute_failure(3, list(workers.values()), WorkerError("the first stage ended its stream"))
    )
    await asyncio.sleep(0)
    workers["a"].receive(PeerUnreachable(3, "b", "no answer"))
    for _ in range(10):
        await asyncio.sleep(0)
    workers["b"].receive(ALIVE)
    assert str(await asking).startswith("the pipeline of workers a [2, 4), b [2, 4), c [2, 4) broke: the first stage")


GROUP = tuple(GroupMember(name, f"unix:/{name}.l") for name in "abc")


def group_of_three() -> dict[str, WorkerHandle]:
    """Workers a, b and c that hold one stage of epoch 3 together."""
    workers = three()
    for member, worker in enumerate(workers.values()):
        order = replace(LOAD, group=GroupOrder(bytes(GROUP_ID_BYTES), GROUP, member))
        worker.stages[3] = (order, Loaded(3, 1, 1, 1))
    return workers


@pytest.mark.parametrize(("reporter", "other", "third"), [("a", "b", "c"), ("b", "a", "c"), ("c", "b", "a")])
async def test_members_that_cannot_reach_each_other_are_no_fault_of_the_one_that_gave_up(
    reporter: str, other: str, third: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reporting member has also closed its link to the third one; the two reports come in either order."""
    monkeypatch.setattr(failure_attribution, "_ATTRIBUTION_S", 20.0)
    for is_first in (True, False):
        workers = group_of_three()
        asking = asyncio.create_task(attribute_failure(3, list(workers.values()), None))
        await asyncio.sleep(0)
        reports: list[tuple[str, WorkerMessage]] = [
            (reporter, PeerUnreachable(3, other, "no answer")),
            (third, GroupFault(3, reporter, "closed", "-")),
        ]
        for name, message in reports if is_first else reports[::-1]:
            workers[name].receive(message)
            await asyncio.sleep(0)
        workers[other].receive(ALIVE)
        error = await asking
        assert error.worker is None
        assert str(error) == f"workers {reporter} and {other} of a group cannot reach each other"


async def test_a_search_that_is_cancelled_leaves_no_tasks() -> None:
    before = asyncio.all_tasks()
    asking = asyncio.create_task(attribute_failure(3, list(group_of_three().values()), None))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(60):
        await until(lambda: asyncio.all_tasks() == before)


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("sender", "abd")
@pytest.mark.parametrize("accused", ["a", "b", "c", "d", "e", "nobody"])
async def test_a_member_reports_others_of_its_group_and_by_itself_that_it_failed(
    sender: str, accused: str, kind: str
) -> None:
    """Workers d and e hold stages alone."""
    workers = group_of_three()
    for name in "de":
        workers[name] = WorkerHandle(replace(REGISTER, name=name), _nothing, lambda: "", INSECURE)
        workers[name].stages[3] = (LOAD, Loaded(3, 1, 1, 1))
    report = GroupFault(3, accused, kind, "-")
    if sender in "abc" and accused in "abc" and (kind != "failed" or accused == sender):
        workers[sender].receive(report)
        error = await attribute_failure(3, [workers[sender]], None)
        assert error.worker == (accused if accused == sender else None)
        assert isinstance(error, DisputeError) == (accused != sender)
    else:
        with pytest.raises(ProtocolError, match=rf"worker {sender} \(.*\) must not report worker {accused} as {kind}"):
            workers[sender].receive(report)
        assert workers[sender].group_faults(3).fault is None
    workers[sender].receive(replace(report, epoch=4))  # the stage of this epoch is unloaded


async def test_all_members_have_reported_whomever_they_name() -> None:
    """Accused workers outside the group do not count as members."""
    workers = group_of_three()
    members = [*workers.values()]
    for name, late in zip("abc", "xyz", strict=True):
        workers[name].group_faults(3).report(GroupFault(3, late, "late", "-"))
    async with asyncio.timeout(60):
        assert await _can_be_judged(3, members)


async def test_a_group_whose_members_report_late_is_not_judged_by_one_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The member at fault accuses another one before the others accuse it."""
    monkeypatch.setattr(failure_attribution, "_ATTRIBUTION_S", 0.0)
    workers = group_of_three()
    workers["b"].receive(GroupFault(3, "a", "wrong", "-"))
    asking = asyncio.create_task(attribute_failure(3, list(workers.values()), None))
    await asyncio.sleep(0.05)
    for name in "ac":
        assert not asking.done()
        workers[name].receive(GroupFault(3, "b", "wrong", "-"))
        await asyncio.sleep(0)
    assert (await asking).worker == "b"


async def test_a_member_that_reports_its_own_failure_is_judged_at_once() -> None:
    workers = group_of_three()
    workers["c"].receive(GroupFault(3, "c", "failed", "-"))
    async with asyncio.timeout(60):
        assert await _can_be_judged(3, [*workers.values()])


@pytest.mark.parametrize("guilty", ["b", "c"])
async def test_a_stage_that_cannot_be_opened_is_blamed_on_its_worker_by_name(tmp_path: Path, guilty: str) -> None:
    """The worker is named even if another stage detects the failure, and no message holds an address."""
    model = build_tiny_model(tmp_path / "tiny.gguf", layers=3, context=256)

    async with real_cluster(tmp_path, 3) as cluster:
        handles = await cluster.load_stages(model, (0, 1, 2, 3))
        worker = cluster.registry.workers[guilty]
        kept = dict(worker.stages)
        await worker.unload(1)
        worker.stages.update(kept)  # the coordinator does not notice the unload
        with pytest.raises(WorkerError, match=f"worker {guilty} holds no stage for epoch 0.1") as caught:
            await RemotePipeline.open(1, handles, cluster.run.token)
        assert caught.value.worker == guilty


class Coordinator:
    """A coordinator that admits a worker, and continues to read once `reads` is set."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()

    async def join(self, stream: ServerStream) -> None:
        await stream.accept()
        await stream.read()
        await stream.write(encode_coordinator_message(Admitted(Deadlines(heartbeat_s=30.0))))
        await self.reads.wait()
        await stream.write(encode_coordinator_message(Shutdown("all is said")))
        while await stream.read() is not None:
            pass


async def test_a_stage_that_ends_while_it_tells_of_another_one_does_not_end_its_worker() -> None:
    """The report is not sent at once, because the network or the coordinator is busy."""
    coordinator = Coordinator()
    server = await Server.start("127.0.0.1:0", INSECURE, {JOIN: coordinator.join})
    nothing: Any = SimpleNamespace()
    worker = Worker("a", nothing, nothing, nothing, nothing, Readiness(None))
    member = Member(worker, INSECURE)
    loads = Loads(Session(worker, INSECURE, Deadlines(), Counters(), member.send))
    peer = Peer(server.address, INSECURE)
    async with asyncio.timeout(60):
        await member.join(peer, REGISTER, 10.0)
        serving = asyncio.create_task(member.serve())
        filling = [asyncio.create_task(member.send(RenewCertificate(bytes(1 << 18)))) for _ in range(64)]
        telling = asyncio.create_task(
            loads._report_unreachable(3, Peer("127.0.0.1:1", INSECURE, Principal("b")), "gone")
        )
        await asyncio.sleep(0.1)
        assert not filling[-1].done() and not telling.done()
        for task in (*filling, telling):
            task.cancel()
        await asyncio.gather(*filling, telling, return_exceptions=True)
        coordinator.reads.set()
        assert await serving == "all is said"
    await peer.close()
    await server.stop(0.0)


async def test_a_stream_that_another_task_cancels_is_broken_for_the_others() -> None:
    async def wait(stream: ServerStream) -> None:
        await stream.accept()
        await stream.read()

    server = await Server.start("127.0.0.1:0", INSECURE, {ECHO: wait})
    peer = Peer(server.address, INSECURE, Principal("b"))
    stream = peer.open(ECHO)
    async with asyncio.timeout(60):
        await stream.opened()
        reading = asyncio.create_task(stream.read())
        await asyncio.sleep(0)
        stream.cancel()
        with pytest.raises(StreamBrokenError, match="was cancelled") as caught:
            await reading
        assert caught.value.worker == "b"
    await peer.close()
    await server.stop(0.0)
