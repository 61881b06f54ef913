"""Tests of links between members: rows arrive unchanged; any other bytes close the links with an error that names the
peer."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llamaclust.kernels._native import Link, LinkError, Links
from llamaclust.kernels.backend import Float32
from support.arithmetic.linked import DEADLINE_S, GREETING, HEADER, HandPeer, begin, connected, frame, link_to, linked
from support.descriptors import open_files
from support.seed import SEED

SHORT_S = 0.2
BORDERS = [0, 32, 48]
OWN = np.arange(32, dtype=np.float32)[None]
THEIRS = np.arange(16, dtype=np.float32)[None] - 7
ROWS = THEIRS.tobytes()


def gathered(links: Links, own: Float32 = OWN, number: int = 0) -> Float32:
    whole = np.full((len(own), BORDERS[-1]), np.nan, np.float32)
    links.gather(number, own, whole, BORDERS)
    return whole


@pytest.mark.parametrize(
    "borders",
    [
        *([0, 16, 64], [0, 2048, 4096], [0, 16, 17, 80], [0, 4096, 4112, 8192, 20000]),
        *([0, 64, 64], [0, 0, 4096], [0, 4096, 4096, 4096], [0, 20000, 20000, 20000, 20000]),
    ],
)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_rows_arrive_as_they_are(borders: list[int], rows: int) -> None:
    """Covers any bits including NaN, members that are early or late or have no columns, and rows larger than socket
    buffers."""
    print(f"seed {SEED}")
    made = np.random.default_rng(SEED)
    members = len(borders) - 1
    steps = [made.integers(0, 2**32, (rows, borders[-1]), np.uint32).view(np.float32) for _ in range(4)]
    links = linked(members)

    def run(member: int) -> list[bytes]:
        pauses, found = random.Random(SEED + member), list[bytes]()
        for number, whole in enumerate(steps):
            links[member].begin(SEED, number // 2)
            time.sleep(pauses.choice([0, 0, 1e-3]))
            out = np.zeros_like(whole)
            own = np.ascontiguousarray(whole[:, borders[member] : borders[member + 1]])
            links[member].gather(number % 2, own, out, borders)
            found.append(out.tobytes())
        return found

    with ThreadPoolExecutor(members) as pool:
        for found in pool.map(run, range(members)):
            assert found == [whole.tobytes() for whole in steps]


def test_a_member_without_columns_is_known_by_its_header() -> None:
    """The member rejects the first frame of another one before it has rows to send, and the others reject its
    header."""
    links = linked(3)

    def accused(member: int) -> int:
        links[member].begin(1 + (member == 1), 0)
        with pytest.raises(LinkError, match="has sent epoch") as caught:
            for number, borders in enumerate(([0, 64, 64, 64], [0, 16, 32, 64])):
                own = np.zeros((1, borders[member + 1] - borders[member]), np.float32)
                links[member].gather(number, own, np.zeros((1, 64), np.float32), borders)
        return caught.value.place

    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(accused, range(3))] in ([1, 0, 1], [1, 2, 1])


WRONG: dict[str, tuple[bytes, str]] = {
    "another epoch": (frame(ROWS, epoch=2), "worker 1 has sent epoch 2 where 1 is expected"),
    "an older step": (frame(ROWS, step=1), "worker 1 has sent step 1 where 2 is expected"),
    "a newer step": (frame(ROWS, step=2**64 - 1), "worker 1 has sent step 18446744073709551615 where 2 is expected"),
    "another gather": (frame(ROWS, number=3), "worker 1 has sent gather 3 where 0 is expected"),
    "fewer bytes": (frame(ROWS[:-4]), "worker 1 has sent bytes 60 where 64 is expected"),
    "more bytes": (frame(ROWS + ROWS), "worker 1 has sent bytes 128 where 64 is expected"),
    "a huge size": (frame(ROWS, size=2**32 - 1), "worker 1 has sent bytes 4294967295 where 64 is expected"),
    "the same frame again": (frame(ROWS) * 2, "worker 1 has sent gather 0 where 1 is expected"),
    "another protocol": (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "worker 1 has sent epoch"),
}


@pytest.mark.parametrize("what", WRONG)
def test_anything_but_the_rows_ends_the_links(what: str) -> None:
    sent, words = WRONG[what]
    before = open_files()
    peer = HandPeer(DEADLINE_S)
    peer.links.begin(1, 2)
    peer.end.sendall(sent)
    with pytest.raises(LinkError, match=words):
        for number in range(2):
            gathered(peer.links, number=number)
    for number in (1, 0, 7):
        with pytest.raises(LinkError, match=words):
            gathered(peer.links, number=number)
    assert peer.has_ended(), "after what was sent before"
    peer.links.close()
    assert open_files() <= before


@pytest.mark.parametrize("kept", [0, 1, HEADER.size - 1, HEADER.size, HEADER.size + 1, HEADER.size + len(ROWS) - 1])
@pytest.mark.parametrize("closes", [False, True])
def test_frames_that_do_not_end(kept: int, closes: bool) -> None:
    peer = HandPeer(DEADLINE_S if closes else SHORT_S)
    peer.links.begin(1, 2)
    peer.end.sendall(frame(ROWS)[:kept])
    if closes:
        peer.end.shutdown(socket.SHUT_WR)
    words = "worker 1: the other side has closed" if closes else f"worker 1 has sent {kept} of 88 bytes within 0.2 s"
    with pytest.raises(LinkError, match=words):
        gathered(peer.links)
    assert peer.has_ended()


def test_a_peer_that_sends_slowly_has_no_more_time() -> None:
    peer = HandPeer(SHORT_S)
    peer.links.begin(1, 2)
    ended = threading.Event()

    def trickle() -> None:
        for byte in frame(ROWS):
            if ended.wait(SHORT_S / 20):
                return
            peer.end.send(bytes([byte]))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(trickle)
        with pytest.raises(LinkError, match=r"worker 1 has sent \d+ of 88 bytes within 0.2 s"):
            gathered(peer.links)
        ended.set()


def test_a_peer_that_takes_nothing() -> None:
    peer = HandPeer(SHORT_S)
    peer.links.begin(1, 2)
    own = np.zeros((1 << 20, 32), np.float32)
    sent = threading.Thread(target=peer.end.sendall, args=(frame(ROWS * len(own)),))
    sent.start()
    with pytest.raises(LinkError, match=r"worker 1 has (taken|sent) \d+ of \d+ bytes within 0.2 s"):
        gathered(peer.links, own)
    peer.end.close()
    sent.join(DEADLINE_S)
    assert not sent.is_alive()


@pytest.mark.parametrize("rows", [1, 1 << 18])
def test_a_long_wait_is_parked(rows: int) -> None:
    """Waiting for missing or unread rows takes little processor time; a thread that polled would take 2 s."""
    peer = HandPeer(2.0)
    peer.links.begin(1, 2)
    own, whole = np.zeros((rows, 32), np.float32), np.zeros((rows, 48), np.float32)
    began_s = time.thread_time()
    with pytest.raises(LinkError, match="within 2 s"):
        peer.links.gather(0, own, whole, BORDERS)
    assert time.thread_time() - began_s < 1.0


def test_the_error_names_the_member_that_lacks() -> None:
    """Two of three members wait for the third, and neither reports the other as missing."""
    links = linked(3, 10 * SHORT_S)  # Both have to send within the deadline.
    begin(links, 0)
    borders = [0, 16, 32, 48]

    def run(member: int) -> str:
        with pytest.raises(LinkError) as raised:
            links[member].gather(0, THEIRS, np.zeros((1, 48), np.float32), borders)
        return str(raised.value)

    with ThreadPoolExecutor(2) as pool:
        for text in pool.map(run, (0, 2)):
            assert (
                text.startswith("worker 1 has sent 0 of 88 bytes") and "worker 0" not in text and "worker 2" not in text
            )


@pytest.mark.parametrize("waits_s", [0.0, 0.05])
def test_close_ends_a_gather_of_another_thread(waits_s: float) -> None:
    before = open_files()
    peer = HandPeer(DEADLINE_S)
    peer.links.begin(1, 2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(gathered, peer.links)
        assert peer.receive(HEADER.size) == HEADER.pack(1, 2, 0, OWN.nbytes)
        time.sleep(waits_s)  # the thread polls at first and is parked later
        peer.links.close()
        with pytest.raises(LinkError, match="closed by this process"):
            waiting.result(DEADLINE_S)
    peer.links.close()
    with pytest.raises(LinkError, match="closed by this process"):
        gathered(peer.links)
    assert peer.has_ended()
    assert open_files() <= before


def test_a_frame_that_comes_early_waits_for_its_gather() -> None:
    peer = HandPeer(DEADLINE_S)
    peer.end.sendall(frame(ROWS) + frame(ROWS[::-1], number=1) + frame(ROWS, step=3))
    for step, number, theirs in ((2, 0, ROWS), (2, 1, ROWS[::-1]), (3, 0, ROWS)):
        peer.links.begin(1, step)
        whole = gathered(peer.links, number=number)
        assert whole.tobytes() == OWN.tobytes() + theirs
        assert peer.receive(HEADER.size + OWN.nbytes) == frame(OWN.tobytes(), step=step, number=number)


def _closed() -> socket.socket:
    ours, theirs = connected()
    theirs.close()
    return ours


def _refuses(answer: bytes) -> Callable[[], socket.socket]:
    def made() -> socket.socket:
        ours, theirs = connected()
        theirs.sendall(answer)
        _kept.append(theirs)
        return ours

    return made


_kept: list[socket.socket] = []
BAD_BEGINNINGS: dict[str, tuple[Callable[[], socket.socket], str]] = {
    "another greeting": (_refuses(b"hallo"), "worker 1 belongs to another group or place, or has another version"),
    "half a greeting": (_refuses(GREETING[:2]), "worker 1 did not send its greeting in time: received 2 of 5 bytes"),
    "silence": (_refuses(b""), "worker 1 did not send its greeting in time: received 0 of 5 bytes"),
    "a closed connection": (_closed, "worker 1: the other side has closed|worker 1: the connection has ended"),
    "a socket without a connection": (socket.socket, "worker 1: no connection"),
}


@pytest.mark.parametrize("what", BAD_BEGINNINGS)
def test_links_that_never_begin(what: str) -> None:
    made, words = BAD_BEGINNINGS[what]
    before = open_files()
    with pytest.raises(LinkError, match=words):
        link_to(1, made(), SHORT_S)
    while _kept:
        _kept.pop().close()
    assert open_files() <= before


@pytest.mark.parametrize(
    ("own", "places", "words"),
    [(2, "01", "no place"), (-1, "01", "no place"), (0, "00", "one for each other"), (1, "01", "one for each other")],
)
def test_links_at_wrong_places_are_refused(own: int, places: str, words: str) -> None:
    ours, theirs = connected()
    with theirs:
        theirs.sendall(GREETING)
        link = link_to(1, ours)
        links: list[Link | None] = [link if place == "1" else None for place in places]
        with pytest.raises(ValueError, match=words):
            Links(own, links, DEADLINE_S)


@pytest.mark.parametrize(
    ("own", "whole", "borders"),
    [
        ((1, 32), (1, 48), [0, 32, 40, 48]),
        ((1, 16), (1, 48), [0, 32, 48]),
        ((2, 32), (1, 48), [0, 32, 48]),
        ((1, 32), (1, 40), [0, 32, 48]),
        ((1, 32), (1, 48), [0, 48, 32]),
        ((0, 32), (0, 48), [0, 32, 48]),
        ((1, 32), (1, 48), []),
    ],
)
def test_gathers_of_another_shape_are_refused(own: tuple[int, int], whole: tuple[int, int], borders: list[int]) -> None:
    peer = HandPeer(SHORT_S)
    with pytest.raises(ValueError, match=r"links: as many|gather: rows and columns"):
        peer.links.gather(0, np.zeros(own, np.float32), np.zeros(whole, np.float32), borders)
    peer.links.begin(1, 2)
    peer.end.sendall(frame(ROWS))
    assert gathered(peer.links).tobytes() == OWN.tobytes() + ROWS
