"""Tests of coordinators' terms: a newer coordinator has a larger term, and orders of an older one are refused."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from ssl import DER_cert_to_PEM_cert
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from llamaclust.cluster.membership.authority import Authority
from llamaclust.cluster.membership.join_rules import JoinSettings
from llamaclust.cluster.state import control_record, disk_thread
from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.directory import write_private
from llamaclust.core.epochs import MAX_TERM, epoch_number, epoch_text, term_of
from llamaclust.core.errors import LlamaclustError, SupersededError, WorkerError
from llamaclust.wire.control.codec import decode_worker_message, encode_coordinator_message
from llamaclust.wire.control.messages import (
    Admitted,
    Deadlines,
    LoadFailed,
    Register,
    Rejected,
    WorkerMessage,
)
from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.rpc.methods import JOIN
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.wire.security.certificate_names import COORDINATOR
from llamaclust.wire.security.terms import TermProof, is_term_proven, prove_term
from llamaclust.worker.loads import Loads
from llamaclust.worker.membership import Member
from llamaclust.worker.session import Session
from llamaclust.worker.stage.counters import Counters
from llamaclust.worker.worker import Worker
from support.clusters.members import ANY, join, registry_of
from support.clusters.served import until
from support.wire.control_messages import LOAD, REGISTER
from support.wire.trust import A, B, with_pair


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.json"


async def test_every_start_begins_a_larger_term_and_knows_the_drained_workers(path: Path) -> None:
    first = ControlRecord.begin(path)
    await first.drain(frozenset("ab"))
    assert [epoch_text(first.next_epoch()), epoch_text(first.next_epoch())] == ["1.1", "1.2"]
    second = ControlRecord.begin(path)
    assert (second.term, second.drained) == (2, frozenset("ab"))
    assert second.next_epoch() == epoch_number(2, 1) == (2 << 32) + 1 > first.next_epoch()
    await second.drain(frozenset())
    assert not ControlRecord.begin(path).drained


@pytest.mark.parametrize("text", ["", "{", '{"term": []}', '{"term": 7}', "[]"])
def test_a_damaged_record_is_named_and_begun_anew(text: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text(text)
    record = ControlRecord.begin(path)
    assert (record.term, record.drained) == (1, frozenset())
    assert f"{path}: cannot be read" in caplog.text


async def test_a_lost_records_term_is_exceeded_before_the_first_epoch(path: Path) -> None:
    record = ControlRecord.begin(path)
    assert await record.admits(0) and record.term == 1
    assert await record.admits(5) and record.term == 6
    assert await record.admits(3) and epoch_text(record.next_epoch()) == "6.1"
    assert await record.admits(6) and not await record.admits(9) and record.term == 6
    assert ControlRecord.begin(path).term == 10


def _take_place(path: Path) -> None:
    path.unlink()
    path.mkdir()  # no file can replace a directory


def _give_place(path: Path) -> None:
    path.rmdir()


async def test_a_term_that_was_not_written_is_written_by_the_next_attempt(path: Path) -> None:
    record = ControlRecord.begin(path)
    _take_place(path)
    for _ in range(2):
        with pytest.raises(LlamaclustError, match="cannot be written"):
            await record.admits(7)
    _give_place(path)
    assert await record.admits(7) and ControlRecord.begin(path).term == 9


async def test_a_worker_cannot_use_up_all_terms(path: Path) -> None:
    record = ControlRecord.begin(path)
    assert await record.admits(MAX_TERM) and record.term == (MAX_TERM >> 1) + 1
    assert await record.admits(MAX_TERM) and record.term == (MAX_TERM >> 1) + 1


@pytest.fixture
def hung_look(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Makes the first look at the record on disk hang until the event is set."""
    back, look, hangs = threading.Event(), ControlRecord.newer_term, [True]

    def newer_term(record: ControlRecord) -> int | None:
        return back.wait(60) and None if hangs and hangs.pop() else look(record)

    monkeypatch.setattr(ControlRecord, "newer_term", newer_term)
    yield back
    back.set()


async def test_a_worker_of_a_newer_coordinator_is_refused_and_ends_the_cluster_that_it_served(
    trust: Authority, hung_look: threading.Event
) -> None:
    record = ControlRecord(term=3)
    record.next_epoch()
    async with registry_of(trust.identity(), JoinSettings(5.0, record=record)) as there:
        superseded = asyncio.create_task(there.superseded())
        _, welcome = await join(there, trust.identity(A), REGISTER)
        assert isinstance(welcome, Admitted) and welcome.term == 3
        proven = replace(REGISTER, largest_term=4, term_proof=prove_term(trust.identity(), 4, ""))
        _, refused = await join(there, trust.identity(B), replace(proven, name="b"))
        assert isinstance(refused, Rejected) and not superseded.done(), "b held no layers: its word ends nothing"
        assert "worker b has seen a newer coordinator of this cluster (term 4; this" in refused.reason
        there.workers["a"].stages[LOAD.epoch] = LOAD, SimpleNamespace()  # type: ignore[assignment]
        there.process_exited("a", "killed")
        async with asyncio.timeout(60):
            _, refused = await join(there, trust.identity(A), proven)
            assert isinstance(refused, Rejected)
            with pytest.raises(WorkerError, match="superseded by a newer coordinator: worker a has seen"):
                await superseded
    hung_look.set()  # The end of the event loop waits for the thread.


async def test_a_term_that_grows_is_proven_to_the_members_of_before(trust: Authority) -> None:
    """A coordinator without its state directory learns a larger term, and proves its next one to earlier members."""
    nothing: Any = SimpleNamespace()
    early = Worker("a", nothing, nothing, nothing, nothing)
    async with registry_of(trust.identity(), JoinSettings(5.0, record=ControlRecord(term=1))) as there:
        member, peer = Member(early, trust.identity(A)), Peer(there.address, trust.identity(A), COORDINATOR)
        await member.join(peer, REGISTER, 10.0)
        assert early.terms.largest.value == 1
        late = replace(REGISTER, name="b", largest_term=7, term_proof=prove_term(trust.identity(), 7, ""))
        await join(there, trust.identity(B), late)
        async with asyncio.timeout(60):
            message = await member._receive()
        member._dispatch(message, nothing, nothing, nothing)
        await peer.close()
        assert early.terms.largest.value == 8
        assert is_term_proven(trust.identity(), 8, early.terms.largest.proof, "")


async def test_a_member_that_invents_a_newer_coordinator_is_refused_and_ends_nothing(
    trust: Authority, tmp_path: Path
) -> None:
    """The member has held layers and has a certificate, but only coordinators sign terms."""
    record = ControlRecord(term=3)
    record.next_epoch()
    own, other = trust.identity(A), Authority.open(tmp_path / "other")
    signed = prove_term(own, 4, "")
    proofs = (
        TermProof(),
        signed,
        TermProof(trust.identity().pair.certificate, signed.signature),
        prove_term(trust.identity(), 3, ""),  # every member has this proof
        prove_term(other.identity(), 4, ""),
        prove_term(with_pair(own, other.identity().pair), 4, ""),
        TermProof(b"no certificate", b"no signature"),
    )
    async with registry_of(trust.identity(), JoinSettings(5.0, record=record)) as there:
        superseded = asyncio.create_task(there.superseded())
        await join(there, own, REGISTER)
        there.workers["a"].stages[LOAD.epoch] = LOAD, SimpleNamespace()  # type: ignore[assignment]
        there.process_exited("a", "killed")
        async with asyncio.timeout(60):
            for proof in proofs:
                _, refused = await join(there, own, replace(REGISTER, largest_term=4, term_proof=proof))
                assert isinstance(refused, Rejected) and not superseded.done(), proof
                assert "(term 4, without a valid signature; this coordinator has 3)" in refused.reason
        superseded.cancel()


async def test_a_worker_refuses_memberships_and_loads_of_smaller_terms(
    trust: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    nothing: Any = SimpleNamespace()
    worker = Worker("a", nothing, nothing, nothing, nothing)
    reported = []

    async def admit(stream: ServerStream) -> None:
        await stream.accept()
        register = decode_worker_message(await stream.read() or b"")
        assert isinstance(register, Register)
        reported.append((register.largest_term, register.term_proof))
        await stream.write(encode_coordinator_message(Admitted(Deadlines(), term=next(terms), term_proof=proof)))

    terms, proof = iter((4, 2)), prove_term(trust.identity(), 4, "")
    server = await Server.start(ANY, trust.identity(), {JOIN: admit})
    peer = Peer(server.address, trust.identity(A), COORDINATOR)
    await Member(worker, trust.identity(A)).join(peer, REGISTER, 10.0)
    with pytest.raises(WorkerError, match=r"of term 2 is superseded: this worker has seen a newer one \(term 4\)"):
        await Member(worker, trust.identity(A)).join(peer, REGISTER, 10.0)
    assert reported == [(0, TermProof()), (4, proof)]
    await peer.close()
    await server.stop(0.0)
    answers: list[WorkerMessage] = []

    async def send(message: WorkerMessage) -> None:
        answers.append(message)

    loads = Loads(Session(worker, trust.identity(A), Deadlines(), Counters(), send))
    with caplog.at_level(logging.ERROR):
        await loads.load(replace(LOAD, epoch=epoch_number(3, 9)))
    assert isinstance(answers[0], LoadFailed) and "of term 3 is superseded" in answers[0].failure.message


@pytest.mark.parametrize("seen", [1, 5, MAX_TERM])
async def test_a_worker_of_another_cluster_brings_no_term_with_it(seen: int, trust: Authority) -> None:
    for is_begun in (False, True):
        record = ControlRecord(term=2)
        if is_begun:
            record.next_epoch()
        async with registry_of(trust.identity(), JoinSettings(5.0, record=record, cluster="beta")) as there:
            proof = prove_term(trust.identity(), seen, "alpha")
            foreign = replace(REGISTER, largest_term=seen, term_proof=proof, cluster="alpha")
            _, refused = await join(there, trust.identity(A), replace(foreign, is_awaited=True))
            assert isinstance(refused, Rejected)
            assert "waits for a coordinator of cluster 'alpha', but this is a coordinator of 'beta'" in refused.reason
            _, welcome = await join(there, trust.identity(A), foreign)
            assert isinstance(welcome, Admitted) and welcome.term == record.term == 2


async def test_a_worker_proves_a_term_to_the_superseded_coordinator_that_comes_back(trust: Authority) -> None:
    """The worker joins a newer coordinator and then another cluster before the former coordinator comes back."""
    nothing: Any = SimpleNamespace()
    worker = Worker("a", nothing, nothing, nothing, nothing)
    for name, term, error in (
        ("alpha", 5, None),
        ("beta", 2, None),
        ("alpha", 4, "superseded"),
        ("alpha", 4, r"newer coordinator of this cluster \(term 5; this coordinator has 4\)"),
        ("beta", 3, None),
    ):
        record = ControlRecord(term=term)
        record.next_epoch()
        async with registry_of(trust.identity(), JoinSettings(5.0, record=record, cluster=name)) as there:
            peer = Peer(there.address, trust.identity(A), COORDINATOR)
            joining = Member(worker, trust.identity(A)).join(peer, REGISTER, 10.0)
            if error is None:
                await joining
            else:
                with pytest.raises(LlamaclustError, match=error):
                    await joining
            worker.terms.give_up()
            await peer.close()


async def test_a_coordinator_ends_where_the_state_directory_has_a_larger_term(path: Path, trust: Authority) -> None:
    """The coordinator was cut off from its lock on a file server; its workers are its successor's when it comes
    back."""
    record = ControlRecord.begin(path)
    async with registry_of(trust.identity(), JoinSettings(5.0, record=record)) as registry:
        superseded = asyncio.create_task(registry.superseded())
        await asyncio.sleep(0.05)
        assert not superseded.done()
        newer = ControlRecord.begin(path)
        with pytest.raises(SupersededError, match="the state directory has term 2, and this coordinator has term 1"):
            await asyncio.wait_for(superseded, 20)
    with pytest.raises(SupersededError, match="newer coordinator"):
        await record.drain(frozenset("a"))
    assert ControlRecord.begin(path).drained == newer.drained == frozenset()


async def test_a_disk_that_hangs_does_not_stop_the_event_loop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    back, write = threading.Event(), write_private

    def hanging(path: Path, text: str) -> None:
        back.wait(60)
        write(path, text)

    record = ControlRecord.begin(path)
    monkeypatch.setattr(control_record, "write_private", hanging)
    monkeypatch.setattr(disk_thread, "_CALL_S", 0.2)
    try:
        draining = asyncio.create_task(record.drain(frozenset("a")))
        await asyncio.sleep(0)
        assert not draining.done()
        with pytest.raises(LlamaclustError, match=r"control.json: cannot be written: no answer within 0.2 s"):
            await draining
    finally:
        back.set()


async def test_a_write_that_hangs_does_not_replace_a_later_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    back, write, hangs = threading.Event(), write_private, [True]

    def hanging(path: Path, text: str) -> None:
        if hangs and hangs.pop():
            back.wait(60)
        write(path, text)

    record = ControlRecord.begin(path)
    monkeypatch.setattr(control_record, "write_private", hanging)
    monkeypatch.setattr(disk_thread, "_CALL_S", 0.1)
    try:
        with pytest.raises(LlamaclustError, match=r"no answer within 0.1 s"):
            await record.drain(frozenset("a"))
        with pytest.raises(LlamaclustError, match="an earlier call has not returned"):
            await record.drain(frozenset("ab"))
    finally:
        back.set()
    monkeypatch.setattr(disk_thread, "_CALL_S", 30.0)
    await until(lambda: not record._disk.hangs)
    await record.drain(frozenset("ab"))  # the record has these names already
    assert ControlRecord.begin(path).drained == {"a", "b"}


@pytest.mark.parametrize(
    ("old", "new"),
    [("06082a8648ce3d040302", "06082a8648ce3d04037f"), ("a003020102", "a003020107")],
    ids=["an unknown algorithm", "an unknown version"],
)
def test_a_proof_that_cannot_be_read_is_none(old: str, new: str, tmp_path: Path) -> None:
    identity = Authority.open(tmp_path / "trust").identity(COORDINATOR)
    certificate = x509.load_pem_x509_certificate(identity.pair.certificate).public_bytes(Encoding.DER)
    changed = certificate.replace(bytes.fromhex(old), bytes.fromhex(new))
    assert changed != certificate
    proof = TermProof(DER_cert_to_PEM_cert(changed).encode(), b"signature")
    assert not is_term_proven(identity, 7, proof, "")


@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_the_last_terms_are_taken_and_then_refused_in_one_line(tmp_path: Path, before: int) -> None:
    path = tmp_path / "record"
    path.write_text(json.dumps({"term": MAX_TERM - 1 - before, "drained": []}))
    for _ in range(before):
        record = ControlRecord.begin(path)
        assert term_of(record.next_epoch()) == record.term and record.newer_term() == 0
    with pytest.raises(LlamaclustError, match=rf"term {MAX_TERM - 1} is the largest term; stop the coordinator"):
        ControlRecord.begin(path)
