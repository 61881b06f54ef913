"""Fuzz tests with malformed and oversized messages of every kind: each gets an error of one line, and other peers are
not affected."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from llamaclust.core.errors import LlamaclustError, ProtocolError
from llamaclust.wire.control.codec import encode_worker_message
from llamaclust.wire.control.messages import Heartbeat
from llamaclust.wire.rpc.client import Peer, StreamBrokenError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.link_probe import MOST_MESSAGES, measure_link, serve_echo
from llamaclust.wire.rpc.methods import ECHO, JOIN
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.wire.security.certificate_names import COORDINATOR
from llamaclust.wire.security.certificates import NewKey
from llamaclust.wire.security.credentials import Insecure
from llamaclust.wire.security.enrolment import Challenge, Grant, Request, encode_request
from llamaclust.worker.enrolment import enrol
from support.clusters.members import join, registry
from support.seed import SEED
from support.wire.control_messages import REGISTER
from support.wire.enrolment_bytes import raw
from support.wire.fuzzed import COUNT, Kind, damaged, kinds
from support.wire.trust import A, B, authority, enrolment, refusals


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_damaged_messages_are_refused_or_read(kind: Kind) -> None:
    """The decoder returns a message or raises a ProtocolError of one line."""
    source = random.Random(f"{SEED} {kind.name}")
    print(f"{COUNT} cases")
    refused = 0
    for case in range(COUNT):
        data = damaged(source, kind.good)
        try:
            kind.decode(data)
        except ProtocolError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500, (case, data)
    assert refused > COUNT / 4


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_oversized_messages_are_refused_before_they_are_read(kind: Kind) -> None:
    data = kind.good[0] + bytes(1 << 27)
    with pytest.raises(ProtocolError):
        kind.decode(data)


def test_a_member_is_not_disturbed_by_another_that_sends_rubbish(tmp_path: Path) -> None:
    """The sender uses mutual TLS and has a valid certificate."""
    asyncio.run(_rubbish_to_a_registry(tmp_path))


async def _rubbish_to_a_registry(tmp_path: Path) -> None:
    source = random.Random(SEED)
    good = [encode_worker_message(REGISTER), encode_worker_message(Heartbeat(0.5, 1, 2, 3, 4))]
    trust = authority(tmp_path)
    async with registry(trust) as there:
        member, _ = await join(there, trust.identity(A), REGISTER)
        peer = Peer(there.address, trust.identity(B), COORDINATOR)
        for case in range(COUNT):
            stream = peer.open(JOIN)
            async with deadline(f"the end of case {case} of seed {SEED}", 60):
                try:
                    await stream.write(damaged(source, good))
                    await stream.done_writing()
                    while await stream.read() is not None:
                        pass
                except StreamBrokenError as error:
                    assert "\n" not in str(error)
            if case % 100 == 0:
                await member.say(Heartbeat(0.5, case + 1, 2, 3, 4))
        await member.say(Heartbeat(0.5, COUNT + 1, 2, 3, 4))
        async with deadline("the last heartbeat", 60):
            while (heartbeat := there.workers["a"].heartbeat) is None or heartbeat.microbatches <= COUNT:
                assert there.workers["a"].loss is None
                await asyncio.sleep(0.01)
        assert [*there.present] == ["a"]
        await peer.close()


def test_links_are_measured_beside_rubbish_on_the_same_port() -> None:
    """The measurement of a peer that answers with random bytes gives a result or an error."""
    asyncio.run(_rubbish_to_an_echo())


async def _rubbish_to_an_echo() -> None:
    source, sent = random.Random(SEED), [encode_worker_message(REGISTER)]

    async def rubbish(stream: ServerStream) -> None:
        await stream.accept()
        while await stream.read() is not None and source.random() > 0.02:
            await stream.write(damaged(source, sent))

    answering = await Server.start("127.0.0.1:0", Insecure(), {ECHO: serve_echo})
    lying = await Server.start("127.0.0.1:0", Insecure(), {ECHO: rubbish})
    peer, liar = Peer(answering.address, Insecure()), Peer(lying.address, Insecure())
    try:
        for case in range(max(8, COUNT // 1000)):
            stream = peer.open(ECHO)
            async with deadline(f"the end of case {case} of seed {SEED}", 60):
                with contextlib.suppress(StreamBrokenError):
                    for _ in range(MOST_MESSAGES + 50):  # The limit of answered messages is exceeded.
                        await stream.write(damaged(source, sent))
                answers = 0
                while await stream.read() == b"here":
                    answers += 1
            assert answers <= MOST_MESSAGES
            stream.cancel()
            with contextlib.suppress(LlamaclustError):
                assert (await measure_link(liar)).bytes_s > 0
        assert (await measure_link(peer)).round_trip_s < 20
    finally:
        await asyncio.gather(peer.close(), liar.close())
        await asyncio.gather(answering.stop(0.0), lying.stop(0.0))


def test_the_enrolment_port_outlives_rubbish(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(_rubbish_to_the_enrolment_port(tmp_path, caplog))


async def _rubbish_to_the_enrolment_port(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = random.Random(SEED)
    trust = authority(tmp_path)
    async with enrolment(trust) as (host, port):
        good = Request("b", NewKey().request, bytes(32)).proven(trust.token, Challenge(trust.certificate, bytes(32)))
        framed = encode_request(good)
        for case in range(max(50, COUNT // 20)):
            data = damaged(source, [len(framed).to_bytes(4, "big") + framed])
            async with deadline(f"the end of case {case} of seed {SEED}", 60), raw(host, port) as client:
                await client.challenge()
                client.writer.write(data)
                if int.from_bytes(data[:4], "big") <= len(data) - 4:
                    with contextlib.suppress(LlamaclustError):
                        assert not isinstance(await client.hear(), Grant)
        await enrol(host, port, trust.token, "b")
        assert len(refusals(caplog.records)) <= 20
