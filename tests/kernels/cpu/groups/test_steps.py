"""Tests of steps that a group's first member begins: all others receive its message, then gather with it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.kernels._native import LinkError, Links, tls_library
from support.arithmetic.linked import DEADLINE_S, HEADER, STEP, HandPeer, frame, linked
from support.seed import SEED
from support.wire.trust import authority

SHORT_S = 0.2
LOOKS = 20
MOST = 1 << 25
MESSAGE = bytes(range(40))
ROWS = np.arange(16, dtype=np.float32)[None]


def message(data: bytes = MESSAGE, epoch: int = 1, step: int = 2, number: int = STEP, size: int | None = None) -> bytes:
    return frame(data, epoch, step, number, size)


def gathered(links: Links, number: int = 0) -> bytes:
    whole = np.zeros((1, 32), np.float32)
    links.gather(number, ROWS, whole, [0, 16, 32])
    return whole.tobytes()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not tls_library(), reason="no TLS"))])
def trust(request: pytest.FixtureRequest, tmp_path: Path) -> Authority | None:
    return authority(tmp_path) if request.param else None


@pytest.mark.parametrize("members", [2, 3])
def test_all_members_get_each_step(members: int, trust: Authority | None) -> None:
    """Covers empty messages, messages larger than socket buffers, gathers in between, and early and late members."""
    print(f"seed {SEED}")
    links, made = linked(members, trust=trust), np.random.default_rng(SEED)
    sizes = [0, 1, 24, 100_000, 20_000_000, 3]
    messages = [made.bytes(size) for size in sizes]
    rows = made.integers(0, 2**32, (members, 16), np.uint32).view(np.float32)
    borders = [16 * place for place in range(members + 1)]

    def run(member: int) -> list[tuple[bytes, bytes]]:
        pauses, found = random.Random(SEED + member), list[tuple[bytes, bytes]]()
        for step, data in enumerate(messages):
            time.sleep(pauses.choice([0, 0, 1e-3]))
            if member == 0:
                links[0].send_step(SEED, step, data)
            else:
                data = links[member].receive_step(SEED, step, MOST)
            whole = np.zeros((1, 16 * members), np.float32)
            links[member].gather(0, rows[member : member + 1], whole, borders)
            found.append((data, whole.tobytes()))
        return found

    with ThreadPoolExecutor(members) as pool:
        for found in pool.map(run, range(members)):
            assert found == [(data, rows.tobytes()) for data in messages]


class Waiting:
    """A thread that calls a blocking function."""

    def __init__(self, call: Callable[[], bytes]) -> None:
        self._pool, self._begun = ThreadPoolExecutor(1), Future[int]()
        self._answer = self._pool.submit(self._run, call)
        self._thread = self._begun.result(DEADLINE_S)

    def _run(self, call: Callable[[], bytes]) -> tuple[bytes, float]:
        self._begun.set_result(threading.get_ident())
        return call(), time.thread_time()

    def park(self) -> None:
        """Waits until the thread takes no more processor time, which shows that it does not poll."""
        clock, looks = time.pthread_getcpuclockid(self._thread), 0
        before_s = time.clock_gettime(clock)
        while looks < LOOKS:
            time.sleep(1e-3)
            now_s = time.clock_gettime(clock)
            looks = looks + 1 if now_s == before_s else 0
            before_s = now_s

    def result(self) -> tuple[bytes, float]:
        """Returns the call's result and the thread's processor time in seconds, or raises the call's error."""
        self._pool.shutdown(wait=False)
        return self._answer.result(DEADLINE_S)


def deadlines_pass(count: int) -> None:
    """Waits until `count` consecutive gathers have missed a deadline of `SHORT_S`."""
    for _ in range(count):
        peer = HandPeer(SHORT_S)
        with pytest.raises(LinkError) as raised:
            gathered(peer.links)
        assert raised.value.kind == "late"


def test_waiting_for_a_step_has_no_deadline() -> None:
    """The first byte arrives after three deadlines, while the thread is parked."""
    peer = HandPeer(SHORT_S, own=1)
    waiting = Waiting(lambda: peer.links.receive_step(1, 2, MOST))
    deadlines_pass(3)
    peer.end.sendall(message())
    data, processor_s = waiting.result()
    assert data == MESSAGE
    assert processor_s < SHORT_S


WRONG: dict[str, tuple[bytes, str]] = {
    "another epoch": (message(epoch=0), "worker 0 has sent epoch 0 where 1 is expected"),
    "an older step": (message(step=1), "worker 0 has sent step 1 where 2 is expected"),
    "a newer step": (message(step=3), "worker 0 has sent step 3 where 2 is expected"),
    "a gather": (message(number=0), "worker 0 has sent gather 0 where the message of the step is expected"),
    "a last gather": (message(number=2**32 - 2), "worker 0 has sent gather 4294967294 where the message of"),
    "a byte too many": (message(bytes(65)), "worker 0 has sent bytes 65 where at most 64 are expected"),
    "a huge size": (message(size=2**32 - 1), "worker 0 has sent bytes 4294967295 where at most 64 are expected"),
    "another protocol": (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "worker 0 has sent epoch"),
}


@pytest.mark.parametrize("what", WRONG)
def test_anything_but_the_step_ends_the_links(what: str) -> None:
    sent, words = WRONG[what]
    peer = HandPeer(DEADLINE_S, own=1)
    peer.end.sendall(sent)
    calls: list[Callable[[], object]] = [lambda: peer.links.receive_step(1, 2, 64), lambda: gathered(peer.links)]
    for call in (*calls, *calls):
        with pytest.raises(LinkError, match=words) as raised:
            call()
        assert (raised.value.place, raised.value.kind) == (0, "wrong")
    assert peer.has_ended()


def test_a_step_where_a_gather_is_expected() -> None:
    peer = HandPeer(DEADLINE_S, own=1)
    peer.end.sendall(message() + message(step=3))
    assert peer.links.receive_step(1, 2, MOST) == MESSAGE
    with pytest.raises(LinkError, match="worker 0 has sent step 3 where 2 is expected"):
        gathered(peer.links)
    peer = HandPeer(DEADLINE_S, own=1)
    peer.end.sendall(message() * 2)
    assert peer.links.receive_step(1, 2, MOST) == MESSAGE
    with pytest.raises(LinkError, match="worker 0 has sent the message of the step where gather 0 is expected"):
        gathered(peer.links)


@pytest.mark.parametrize("kept", [1, HEADER.size - 1, HEADER.size, HEADER.size + 1, HEADER.size + len(MESSAGE) - 1])
@pytest.mark.parametrize("closes", [False, True])
def test_steps_that_do_not_end(kept: int, closes: bool) -> None:
    peer = HandPeer(DEADLINE_S if closes else SHORT_S, own=1)
    peer.end.sendall(message()[:kept])
    if closes:
        peer.end.close()
    with pytest.raises(
        LinkError, match=r"worker 0.*closed|worker 0 has sent \d+ of (24|64) bytes within 0.2 s"
    ) as raised:
        peer.links.receive_step(1, 2, MOST)
    assert (raised.value.place, raised.value.kind) == (0, "closed" if closes else "late")


def test_a_peer_that_goes_while_no_step_comes() -> None:
    peer = HandPeer(SHORT_S, own=1)
    waiting = Waiting(lambda: peer.links.receive_step(1, 2, MOST))
    deadlines_pass(2)
    peer.end.close()
    with pytest.raises(LinkError, match="worker 0: the other side has closed") as raised:
        waiting.result()
    assert (raised.value.place, raised.value.kind) == (0, "closed")


@pytest.mark.parametrize("reads", [0, 1_000_000])
def test_a_stopped_peer_does_not_take_a_step(reads: int) -> None:
    peer = HandPeer(SHORT_S)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(peer.receive, reads)
        words = r"worker 1 has taken \d+ of 40000024 bytes within 0.2 s: step 2, the message of the step"
        with pytest.raises(LinkError, match=words) as raised:
            peer.links.send_step(1, 2, bytes(40_000_000))
        reading.result(DEADLINE_S)
    assert (raised.value.place, raised.value.kind) == (1, "late")
    with pytest.raises(LinkError, match=words):
        peer.links.send_step(1, 3, b"")


@pytest.mark.parametrize("is_parked", [False, True], ids=["it may poll", "it is parked"])
@pytest.mark.parametrize("sent", [b"", message()[:7], message()[:-1]])
def test_close_ends_a_wait_of_another_thread(is_parked: bool, sent: bytes) -> None:
    peer = HandPeer(DEADLINE_S, own=1)
    peer.end.sendall(sent)
    waiting = Waiting(lambda: peer.links.receive_step(1, 2, MOST))
    if is_parked:
        waiting.park()
    peer.links.close()
    with pytest.raises(LinkError, match="closed by this process") as raised:
        waiting.result()
    assert (raised.value.place, raised.value.kind) == (-1, "closed")
    assert peer.has_ended()


def test_close_ends_a_step_that_is_not_taken() -> None:
    peer = HandPeer(DEADLINE_S)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(peer.links.send_step, 1, 2, bytes(40_000_000))
        assert peer.receive(HEADER.size) == HEADER.pack(1, 2, STEP, 40_000_000)
        peer.links.close()
        with pytest.raises(LinkError, match="closed by this process"):
            sending.result(DEADLINE_S)


def test_each_member_has_its_call() -> None:
    first, second = linked(2)
    with pytest.raises(ValueError, match="the first member begins steps"):
        first.receive_step(1, 2, MOST)
    with pytest.raises(ValueError, match="the first member begins steps"):
        second.send_step(1, 2, MESSAGE)
    first.send_step(1, 2, MESSAGE)
    assert second.receive_step(1, 2, MOST) == MESSAGE


def test_counters() -> None:
    """Wait times include only gathers that wait for the last member; byte counts include the messages of steps."""
    links = linked(3)
    rows, step = 2 * (24 + 64), 24 + len(MESSAGE)
    begins = {0: 2 * step, 1: 0, 2: 0}  # bytes that a member has sent before its first gather

    def run(member: int) -> None:
        if member == 0:
            links[0].send_step(1, 2, MESSAGE)
        else:
            links[member].receive_step(1, 2, MOST)
        for number in range(2):
            if member == 2:
                until_sent(number)
            links[member].gather(number, ROWS, np.zeros((1, 48), np.float32), [0, 16, 32, 48])

    def until_sent(number: int) -> None:
        """Waits until both other members wait in this gather."""
        while any(links[other].counters().sent_bytes < begins[other] + (number + 1) * rows for other in (0, 1)):
            time.sleep(1e-3)
        time.sleep(0.02)

    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(run, member) for member in (1, 2)]
        time.sleep(0.2)  # the others wait for a step meanwhile
        run(0)
        for each in waiting:
            each.result(DEADLINE_S)
    first, second, third = (each.counters() for each in links)
    assert [each.gathers for each in (first, second, third)] == [2, 2, 2]
    assert (first.sent_bytes, first.received_bytes) == (2 * rows + 2 * step, 2 * rows)
    for counters in (second, third):
        assert (counters.sent_bytes, counters.received_bytes) == (2 * rows, 2 * rows + step)
    assert first.waited_for_s == [0, 0, first.waited_s]
    assert second.waited_for_s == [0, 0, second.waited_s]
    assert first.waited_s > 0.02 and second.waited_s > 0.02


def test_what_links_name_in_errors() -> None:
    """Errors name the member at fault, even if another member waits for it as well."""
    links = linked(3, 10 * SHORT_S)  # Both have to send within the deadline.
    with ThreadPoolExecutor(2) as pool:
        failing = [
            pool.submit(links[member].gather, 0, ROWS, np.zeros((1, 48), np.float32), [0, 16, 32, 48])
            for member in (0, 2)
        ]
        errors = [each.exception(DEADLINE_S) for each in failing]
    for error in errors:
        assert isinstance(error, LinkError)
        assert (error.place, error.kind) == (1, "late")
        assert str(error).startswith("worker 1 has sent 0 of 88 bytes")
