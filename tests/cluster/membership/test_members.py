"""Tests of a coordinator's registry over mutual TLS: workers must have the names of their certificates; renewals."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from llamaclust.cluster.launchers.static import keep_renewed
from llamaclust.cluster.membership import join_rules, members
from llamaclust.cluster.membership.authority import Authority
from llamaclust.cluster.membership.join_rules import JoinSettings
from llamaclust.cluster.membership.members import Members
from llamaclust.cluster.membership.registry import Registry
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.core.errors import DeadlineError, LlamaclustError, ProtocolError, WorkerError
from llamaclust.model.loader import Model
from llamaclust.wire.codec import PROTOCOL_VERSION
from llamaclust.wire.control.messages import (
    Admitted,
    CertificateRenewed,
    CoordinatorMessage,
    Heartbeat,
    Quiet,
    Rejected,
    RenewalFailed,
    RenewCertificate,
    Shutdown,
)
from llamaclust.wire.rpc.client import Peer, StreamBrokenError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import ENCODE, FORWARD, JOIN, SAMPLE, SAMPLED_TOKENS
from llamaclust.wire.rpc.server import Server
from llamaclust.wire.security import renewal
from llamaclust.wire.security.certificate_names import COORDINATOR, Principal
from llamaclust.wire.security.certificates import NewKey
from llamaclust.wire.security.credentials import Identity, Insecure, KeyPair
from llamaclust.worker.membership import Renewal
from llamaclust.worker.service import StageService
from support.clusters.members import ANY, Joined, join, registry, registry_of
from support.clusters.real_cluster import microbatches
from support.clusters.stage_chain import chain
from support.models.tiny_model import build_tiny_model
from support.wire.control_messages import REGISTER
from support.wire.trust import A, B, refusals

SECOND = replace(REGISTER, pid=REGISTER.pid + 1)
ALIVE = Heartbeat(0.5, 1, 2, 3, 4)


@pytest.mark.parametrize(("host", "code"), [("127.0.0.1", 2), ("203.0.113.9", 1)])
async def test_only_a_port_in_use_is_wrong_usage(trust: Authority, host: str, code: int) -> None:
    """This machine may get an address later, and systemd does not start wrong usage again."""
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(LlamaclustError, match=f"{host} port {port}: .*; choose .* `join.members`") as late:
            await Registry(f"{host}:{port}", trust.identity(), lambda *_: "", JoinSettings(5.0)).__aenter__()
    assert late.value.exit_code == code


async def test_a_worker_that_poses_as_another_is_refused_and_logged_once(
    trust: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with registry(trust) as there:
        member, welcome = await join(there, trust.identity(A), REGISTER)
        assert isinstance(welcome, Admitted)
        for who, name in ((B, "a"), (B, "c"), (COORDINATOR, "b")):
            _, refused = await join(there, trust.identity(who), replace(REGISTER, name=name))
            assert isinstance(refused, Rejected)
            assert refused.reason == f"the certificate of {who} cannot register worker {name}"
        assert len(refusals(caplog.records)) == 3
        await member.say(ALIVE)
        assert [*there.present] == ["a"]
        first = there.workers["a"]
        for register in (SECOND, REGISTER):  # A newcomer may also claim the member's own pid and address.
            joining = asyncio.create_task(join(there, trust.identity(A), register))
            async with deadline("a refusal", 60):
                while not joining.done():
                    await member.say(ALIVE)
                    await asyncio.wait((joining,), timeout=0.05)
            _, second = joining.result()
            assert isinstance(second, Rejected) and "is a member already" in second.reason
            assert there.present == {"a": first}


@pytest.mark.parametrize("extensions", [(120.0,), (0.0, 60.0), (30.0, 120.0)])
async def test_a_worker_may_be_silent_for_as_long_as_it_has_announced(
    trust: Authority, extensions: tuple[float, ...]
) -> None:
    """A heartbeat in between does not end the extension. A `Quiet` message with 0 seconds does."""
    async with registry(trust, heartbeat_timeout_s=0.5) as there:
        worker, _ = await join(there, trust.identity(A), REGISTER)
        for seconds in extensions:
            await worker.say(Quiet(seconds))
        await worker.say(ALIVE)
        for number in range(2):  # Others that come later and announce nothing are lost in the meantime.
            name = f"b{number}"
            await join(there, trust.identity(Principal(name)), replace(REGISTER, name=name))
            async with deadline("the loss of another silent worker", 60):
                await there.workers[name].lost.wait()
        assert there.workers["a"].loss is None
        await worker.say(Quiet(0.0))
        async with deadline("the loss of a silent worker", 60):
            await there.workers["a"].lost.wait()


async def test_who_hangs_is_waited_for_and_then_replaced_by_who_joins_under_its_name(trust: Authority) -> None:
    async with registry(trust, heartbeat_timeout_s=0.5) as there:
        hung, _ = await join(there, trust.identity(A), REGISTER)
        _, welcome = await join(there, trust.identity(A), SECOND)
        assert isinstance(welcome, Admitted)
        assert there.workers["a"].registration.pid == SECOND.pid and there.workers["a"].loss is None
        async with deadline("the end of the first membership", 60):
            with contextlib.suppress(StreamBrokenError):
                while await hung.hear():
                    pass


async def test_another_protocol_version_arithmetic_or_an_unusable_address_is_refused_by_name(trust: Authority) -> None:
    other = PROTOCOL_VERSION + 1
    async with registry(trust) as there:
        changes: tuple[tuple[dict[str, Any], str], ...] = (
            ({"protocol_version": other}, f"worker a speaks protocol {other}, this coordinator {PROTOCOL_VERSION}:"),
            ({"numerics_version": 99}, "worker a computes by numerics_version 99, this cluster needs"),
            ({"address": "unix:/run/a.sock"}, "worker a has no usable address: 'unix:/run/a.sock'"),
            ({"address": "nowhere"}, "worker a has no usable address: 'nowhere' is not an address"),
            (
                {"link_address": "unix:/run/a"},
                "worker a has no usable address: 'unix:/run/a' is not",
            ),
        )
        for change, reason in changes:
            _, refused = await join(there, trust.identity(A), replace(REGISTER, **change))
            assert isinstance(refused, Rejected) and refused.reason.startswith(reason)


async def test_more_workers_than_a_plan_can_have_are_refused(trust: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_rules, "MAX_WORKERS", 1)
    async with registry(trust) as there:
        await join(there, trust.identity(A), REGISTER)
        _, refused = await join(there, trust.identity(B), replace(REGISTER, name="b"))
        assert isinstance(refused, Rejected) and refused.reason == "the cluster has 1 workers, which is the limit"


async def test_workers_of_a_start_that_waited_in_vain_are_not_told_to_end(trust: Authority) -> None:
    for error in (DeadlineError("worker b did not join"), WorkerError("the cluster ends")):
        with pytest.raises(type(error)):
            async with registry(trust) as there:
                member, _ = await join(there, trust.identity(A), REGISTER)
                raise error
        try:
            heard = await member.hear()
        except WorkerError:  # the connection broke
            heard = None
        assert isinstance(heard, Shutdown) == isinstance(error, WorkerError)


async def test_a_registry_that_is_closed_leaves_no_task(trust: Authority) -> None:
    """Tasks of the registry end even if members' calls end later."""
    async with registry(trust) as there:
        members = [
            await join(there, trust.identity(A), REGISTER),
            await join(there, trust.identity(B), replace(REGISTER, name="b")),
        ]
        assert all(isinstance(welcome, Admitted) for _, welcome in members)
    async with deadline("the members' calls", 60):
        for member, _ in members:
            with contextlib.suppress(StreamBrokenError):
                while await member.hear():
                    pass
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
    assert [task for task in left if re.search("Registry|Members", str(task.get_coro()))] == []


async def test_certificates_are_renewed_over_the_membership(trust: Authority) -> None:
    identity = trust.identity(A, timedelta(minutes=30))
    identity.pair = replace(identity.pair, made_at_s=identity.pair.made_at_s - 10 * identity.pair.life_s)
    short = identity.pair
    async with registry(trust) as there:
        member, _ = await join(there, identity, REGISTER)
        renewal = Renewal(identity, member.say)
        asking = asyncio.create_task(renewal.run())
        async with deadline("a renewal", 60):
            answer = await member.hear()
        assert isinstance(answer, CertificateRenewed)
        renewal.receive(answer)
        asking.cancel()
        assert identity.pair is not short and identity.pair.ends_at_s > short.ends_at_s + 3600
        with pytest.raises(ProtocolError, match="did not request"):
            renewal.receive(answer)
        member.stream.cancel()
        await there.workers["a"].lost.wait()
        _, welcome = await join(there, identity, REGISTER)
        assert isinstance(welcome, Admitted)


async def test_a_renewed_certificate_is_looked_at_again_at_once(trust: Authority) -> None:
    """The clock may be set twice within a minute."""
    identity = trust.identity(A)
    async with registry(trust) as there:
        member, _ = await join(there, identity, REGISTER)
        renewal = Renewal(identity, member.say)
        asking = asyncio.create_task(renewal.run())
        for _ in range(2):
            fresh = identity.pair
            identity.pair = replace(fresh, made_at_s=fresh.made_at_s - 10 * fresh.life_s)
            async with deadline("a renewal", 60):
                answer = await member.hear()
            assert isinstance(answer, CertificateRenewed)
            renewal.receive(answer)
        asking.cancel()


async def test_a_late_answer_to_an_earlier_renewal_is_not_used(trust: Authority) -> None:
    identity = trust.identity(A, timedelta(minutes=30))
    identity.pair = replace(identity.pair, made_at_s=identity.pair.made_at_s - 10 * identity.pair.life_s)
    async with registry(trust) as there:
        member, _ = await join(there, identity, REGISTER)
        earlier = NewKey()
        await member.say(RenewCertificate(earlier.request))
        late = await member.hear()
        assert isinstance(late, CertificateRenewed)
        renewal, before = Renewal(identity, member.say), identity.pair
        asking = asyncio.create_task(renewal.run())
        async with deadline("a renewal", 60):
            answer = await member.hear()
        assert isinstance(answer, CertificateRenewed)
        renewal.receive(late)
        assert identity.pair is before
        renewal.receive(answer)
        asking.cancel()
        assert identity.pair is not before


async def test_the_coordinators_own_certificate_is_renewed(trust: Authority) -> None:
    identity = trust.identity(COORDINATOR, timedelta(seconds=3))
    short = identity.pair
    renewing = asyncio.create_task(keep_renewed(trust, identity))
    async with deadline("a new certificate", 60):
        while identity.pair is short:
            assert not renewing.done()
            await asyncio.sleep(0.01)
    renewing.cancel()
    assert identity.pair.ends_at_s > short.ends_at_s + 3600


@pytest.mark.parametrize("jump_s", [9 * 3600, 365 * 86400, -3600, -365 * 86400])
async def test_a_machine_that_was_suspended_or_whose_clock_was_set_renews_its_certificate_within_seconds(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    begun_s = now_s = 2e9
    slept = list[float]()

    async def jump(seconds: float) -> None:
        nonlocal now_s
        slept.append(seconds)
        now_s += jump_s if len(slept) == 2 else seconds

    monkeypatch.setattr(asyncio, "sleep", jump)
    monkeypatch.setattr(time, "time", lambda: now_s)
    await renewal.until_renewal(Identity(b"", "c", A, KeyPair(b"", b"", begun_s, begun_s + 12 * 3600.0)))
    assert slept == [5.0, 5.0], "two thirds of its life were over, or it was not valid yet"


async def test_a_renewal_is_for_the_name_of_the_present_certificate_and_a_bad_one_harms_no_member(
    trust: Authority,
) -> None:
    async with registry(trust) as there:
        member, _ = await join(there, trust.identity(A), REGISTER)
        await member.say(RenewCertificate(b"nonsense"))
        failed = await member.hear()
        assert isinstance(failed, RenewalFailed) and "certificate request" in failed.failure.message
        key = NewKey()
        await member.say(RenewCertificate(key.request))
        renewed = await member.hear()
        assert isinstance(renewed, CertificateRenewed)
        identity = trust.identity(B)
        identity.pair = key.with_certificate(renewed.certificate)
        _, refused = await join(there, identity, replace(REGISTER, name="b"))
        assert isinstance(refused, Rejected) and "the certificate of worker a" in refused.reason
        with pytest.raises(ProtocolError, match="not the key in the request"):
            NewKey().with_certificate(renewed.certificate)


async def test_where_there_are_no_certificates_none_is_renewed() -> None:
    async with registry_of(Insecure(), JoinSettings(5.0)) as there:
        member, welcome = await join(there, Insecure(), REGISTER)
        assert isinstance(welcome, Admitted)
        await member.say(RenewCertificate(NewKey().request))
        with pytest.raises(StreamBrokenError, match="no certificates to renew"):
            await member.hear()


async def test_messages_that_are_too_large_end_their_own_stream(trust: Authority) -> None:
    async with registry(trust) as there:
        member, _ = await join(there, trust.identity(A), REGISTER)
        for data in (b"x" * (1 << 20), bytes(1 << 28)):
            other = Joined(Peer(there.address, trust.identity(B), COORDINATOR).open(JOIN))
            with pytest.raises(StreamBrokenError):
                await other.stream.write(data)
                await other.hear()
        await member.say(ALIVE)
        assert there.workers["a"].loss is None


async def test_stage_streams_are_for_members(trust: Authority) -> None:
    server = await Server.start(ANY, trust.identity(A), StageService("a").handlers)
    try:
        for who, method, message in (
            (COORDINATOR, SAMPLE, "worker a holds no stage for epoch 0.1"),
            (B, FORWARD, "worker a holds no stage for epoch 0.1"),
            (COORDINATOR, ENCODE, "worker a holds no image encoder for epoch 0.1"),
            (B, ENCODE, "worker b opened a stream that is reserved for the coordinator"),
            (B, SAMPLE, "worker b opened a stream that is reserved for the coordinator"),
        ):
            peer = Peer(server.address, trust.identity(who), A)
            with pytest.raises(StreamBrokenError, match=message):
                await peer.open(method, epoch=1).opened()
            await peer.close()
        foreign = Authority.open(trust.token_file.parent.with_name("foreign")).identity(Principal("b"))
        with pytest.raises(WorkerError):
            await Peer(server.address, foreign, A).open(FORWARD, epoch=1).opened()
    finally:
        await server.stop(0.0)


async def test_a_stage_takes_streams_from_its_neighbours_alone(trust: Authority, tmp_path: Path) -> None:
    """The plan names the neighbours; streams of other members, and a neighbour's second stream, change nothing."""
    model = Model.open(build_tiny_model(tmp_path / "tiny.gguf", hidden=64, layers=3, heads=4, ffn=96))
    async with chain(model, tmp_path, (0, 1, 2, 3), trust=trust) as there:
        first, middle, last = there.peers
        idle = Principal("spare")
        for stage, method, caller, message in (
            (first, FORWARD, idle, "worker spare opened a stream that is reserved for the coordinator"),
            (first, FORWARD, Principal("w1"), "worker w1 opened a stream that is reserved for the coordinator"),
            (first, FORWARD, COORDINATOR, "a second stream of microbatches was opened for epoch 0.1"),
            (first, SAMPLED_TOKENS, idle, "worker spare opened a stream that is reserved for worker w2"),
            (first, SAMPLED_TOKENS, Principal("w1"), "worker w1 opened a stream that is reserved for worker w2"),
            (first, SAMPLED_TOKENS, Principal("w2"), "a second stream of sampled tokens was opened for epoch 0.1"),
            (middle, FORWARD, idle, "worker spare opened a stream that is reserved for worker w0"),
            (middle, FORWARD, COORDINATOR, "the coordinator opened a stream that is reserved for worker w0"),
            (last, FORWARD, Principal("w0"), "worker w0 opened a stream that is reserved for worker w1"),
            (last, SAMPLE, idle, "worker spare opened a stream that is reserved for the coordinator"),
        ):
            peer = Peer(stage.address, trust.identity(caller), stage.principal)
            with pytest.raises(StreamBrokenError, match=message):
                await peer.open(method, epoch=1).opened()
            await peer.close()
        for microbatch, inputs in microbatches(there.model_id, 1, 4):
            await there.submit(microbatch, inputs)
            assert (await there.result()).failure is None


async def test_methods_that_there_are_not_are_refused(trust: Authority) -> None:
    """Reflection, health checks and the like are not served."""
    async with registry(trust) as there:
        for method in (
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/grpc.health.v1.Health/Watch",
            "/llamaclust.v1.Coordinator/Shutdown",
            "/",
        ):
            peer = Peer(there.address, trust.identity(A), COORDINATOR)
            with pytest.raises((StreamBrokenError, grpc.RpcError)):
                await peer.open(method, reply_bytes=0).opened()
            await peer.close()


def test_the_earliest_lost_workers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MAX_LOST_WORKERS", 2)
    known = Members(lambda *_: "")

    async def send(message: CoordinatorMessage) -> None:
        raise AssertionError(message)

    def admit(name: str) -> WorkerHandle:
        handle = WorkerHandle(replace(REGISTER, name=name), send, lambda: "", Insecure())
        known.admit(handle)
        return handle

    first, second, third, fourth = map(admit, "abcd")
    for handle in (second, first):
        known.mark_lost(handle, "killed")
    admit("b")
    known.mark_lost(third, "killed")
    assert {*known.workers} == {*known.joins} == {*"abcd"}
    known.mark_lost(fourth, "killed")
    assert {*known.workers} == {*known.joins} == {*"bcd"}
    assert {*known.present} == {"b"}
