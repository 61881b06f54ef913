"""Tests of peers that read nothing for seconds or keep TLS busy: links wait or close in bounded time."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.kernels._native import LinkError, Links, tls_library
from llamaclust.wire.security.certificate_names import Principal
from support.arithmetic.linked import DEADLINE_S, GREETING, connected, link_to, tls_settings

BORDERS = [0, 32, 48]
ROWS = 1 << 18
BLOCKED_S = 8.0  # probes of a zero window are 3.2 s apart by then
ANSWER_S = 0.5


def test_a_peer_that_has_no_room_is_reached_all_the_same() -> None:
    """The peer's kernel answers zero-window probes at growing intervals, so the peer is late but reachable."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ours = socket.create_connection(listener.getsockname())
        end = listener.accept()[0]
    with end:
        end.sendall(GREETING)
        links = Links(0, [None, link_to(1, ours)], BLOCKED_S, ANSWER_S)
        links.begin(1, 2)
        own, whole = np.zeros((ROWS, 32), np.float32), np.zeros((ROWS, 48), np.float32)
        with pytest.raises(LinkError, match=r"within 8 s") as raised:
            links.gather(0, own, whole, BORDERS)
        assert raised.value.kind == "late"
        links.close()


def write_identity(trust: Authority, folder: Path) -> None:
    identity = trust.identity(Principal("w1"))
    for name, data in (
        ("ca", identity.ca),
        ("certificate", identity.pair.certificate),
        ("key", identity.pair.private_key),
    ):
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(data)


@pytest.mark.skipif(not tls_library() or shutil.which("openssl") is None, reason="needs OpenSSL and its command")
def test_a_peer_that_renews_its_keys_again_and_again_is_at_fault(tmp_path: Path) -> None:
    """OpenSSL processes key updates internally and returns only application bytes."""
    trust = Authority.open(tmp_path / "authority")
    write_identity(trust, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        files = "-CAfile", tmp_path / "ca", "-cert", tmp_path / "certificate", "-key", tmp_path / "key"
        command: list[str | Path] = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3", *files]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as it:
            assert it.stdin is not None
            it.stdin.write(GREETING)
            it.stdin.flush()
            links = Links(
                0, [None, link_to(1, listener.accept()[0], DEADLINE_S, tls_settings(trust, 0, 1))], DEADLINE_S
            )
            links.begin(1, 2)
            own, whole = np.zeros((1, 32), np.float32), np.zeros((1, 48), np.float32)
            waiting, ended = pool.submit(links.gather, 0, own, whole, BORDERS), threading.Event()
            waiting.add_done_callback(lambda _: ended.set())
            for _ in range(1000):
                if ended.wait(0.01):
                    break
                it.stdin.write(b"k\n")  # one key update per line
                it.stdin.flush()
            with pytest.raises(LinkError, match="new keys") as raised:
                waiting.result(DEADLINE_S)
            assert raised.value.kind == "wrong"
            links.close()
            it.kill()


@pytest.mark.skipif(not tls_library(), reason="needs OpenSSL")
@pytest.mark.parametrize("tickets", [9, 100, 5000])
def test_a_peer_that_sends_tickets_and_no_bytes_is_at_fault(tickets: int, tmp_path: Path) -> None:
    """OpenSSL also processes session tickets internally; members send none."""
    trust = Authority.open(tmp_path / "authority")
    write_identity(trust, tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    context.load_verify_locations(tmp_path / "ca")
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = tickets
    ours, theirs = connected()

    def accept() -> None:
        with suppress(OSError), context.wrap_socket(theirs, server_side=True) as end:
            end.recv(1 << 16)  # the greeting
            end.recv(1)  # until the member closes the link

    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept)
        with pytest.raises(LinkError, match="tickets") as raised:
            link_to(1, ours, DEADLINE_S, tls_settings(trust, 2, 1))
        assert raised.value.kind == "wrong"
        accepted.result(DEADLINE_S)
