"""Peers that take nothing for seconds, and peers that keep TLS busy: their links wait, or end, in bounded time."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.kernels._native import LinkError, Links, tls_library
from llamaclust.wire.security.credentials import Principal
from support.arithmetic.linked import DEADLINE_S, GREETING, link_to, tls_settings

BORDERS = [0, 32, 48]
ROWS = 1 << 18
BLOCKED_S = 8.0  # probes of a closed window are 3.2 s apart by then
ANSWER_S = 0.5


def test_a_peer_that_has_no_room_is_reached_all_the_same() -> None:
    """Its system answers probes whose intervals grow: the peer is late, and no network has failed."""
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


@pytest.mark.skipif(not tls_library() or shutil.which("openssl") is None, reason="needs OpenSSL and its command")
def test_a_peer_that_renews_its_keys_again_and_again_is_at_fault(tmp_path: Path) -> None:
    """OpenSSL reads key updates by itself and returns for bytes only."""
    trust = Authority.open(tmp_path / "authority")
    identity = trust.identity(Principal("w1"))
    for name, data in (
        ("ca", identity.ca),
        ("certificate", identity.pair.certificate),
        ("key", identity.pair.private_key),
    ):
        (tmp_path / name).touch(mode=0o600)
        (tmp_path / name).write_bytes(data)
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
                it.stdin.write(b"k\n")  # a key update for each line that it reads by itself
                it.stdin.flush()
            with pytest.raises(LinkError, match="new keys") as raised:
                waiting.result(DEADLINE_S)
            assert raised.value.kind == "wrong"
            links.close()
            it.kill()
