"""Tests of channels and servers: token, errors that the other side gets, and addresses."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamaclust.core.errors import DeadlineError, ProtocolError, UsageError
from llamaclust.wire.rpc.client import Peer, StreamBrokenError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import SAMPLE, SAMPLED_TOKENS
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.wire.security.credentials import check_private
from llamaclust.wire.security.token import ClusterToken, JoinToken

TOKEN = ClusterToken("t" * 40)
WRONG = ClusterToken("t" * 39 + "u")


async def _echo(stream: ServerStream) -> None:
    await stream.accept()
    while (data := await stream.read()) is not None:
        if data == b"bad":
            raise ProtocolError("that was bad")
        if data == b"bug":
            raise ZeroDivisionError("oops")
        await stream.write(data + str(stream.epoch).encode())


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"unix:{tmp_path}/s.sock" if request.param == "unix" else "127.0.0.1:0"


async def test_a_stream_carries_bytes_both_ways(address: str) -> None:
    server = await Server.start(address, TOKEN, {SAMPLE: _echo})
    peer = Peer(server.address, TOKEN)
    stream = peer.open(SAMPLE, epoch=7)
    await stream.opened()
    for size in (0, 1, 1 << 23):
        await stream.write(b"x" * size)
        assert await stream.read() == b"x" * size + b"7"
    await stream.done_writing()
    assert await stream.read() is None
    await peer.close()
    await server.stop(0.0)


def test_a_wrong_or_missing_token_is_refused_before_anything_is_read(address: str) -> None:
    reached = []

    async def handler(stream: ServerStream) -> None:
        reached.append(stream)

    async def run() -> None:
        server = await Server.start(address, TOKEN, {SAMPLE: handler})
        for token in (WRONG, ClusterToken("")):
            stream = Peer(server.address, token).open(SAMPLE)
            with pytest.raises(StreamBrokenError, match="token is missing or wrong"):
                await stream.opened()
        await server.stop(0.0)

    asyncio.run(run())
    assert not reached


@pytest.mark.parametrize(
    ("sent", "heard"), [(b"bad", "that was bad"), (b"bug", "ZeroDivisionError: oops")], ids=["bad", "bug"]
)
async def test_an_error_of_the_server_reaches_the_client_in_one_line(address: str, sent: bytes, heard: str) -> None:
    server = await Server.start(address, TOKEN, {SAMPLE: _echo})
    stream = Peer(server.address, TOKEN).open(SAMPLE, epoch=1)
    await stream.write(sent)
    with pytest.raises(StreamBrokenError, match=heard):
        await stream.read()
    with pytest.raises(StreamBrokenError):
        await stream.write(b"more")
    await server.stop(0.0)


@pytest.mark.parametrize("epoch", ["", "x", "-1", "1" * 21, str(2**64)])
def test_an_epoch_that_is_no_number_is_refused(epoch: str) -> None:
    class Context:
        def invocation_metadata(self) -> list[tuple[str, str]]:
            return [("llamaclust-epoch", epoch)]

    with pytest.raises(ProtocolError):
        _ = ServerStream(Context(), 1 << 20).epoch


async def test_absent_servers_and_unknown_methods_have_different_errors(address: str, tmp_path: Path) -> None:
    with pytest.raises(StreamBrokenError, match="lost"):
        await Peer(f"unix:{tmp_path}/absent.sock", TOKEN).open(SAMPLE).opened()
    server = await Server.start(address, TOKEN, {SAMPLE: _echo})
    with pytest.raises(StreamBrokenError, match="Method not found"):
        await Peer(server.address, TOKEN).open(SAMPLED_TOKENS).opened()
    await server.stop(0.0)


async def test_two_servers_do_not_share_a_port() -> None:
    server = await Server.start("127.0.0.1:0", TOKEN, {})
    with pytest.raises(UsageError, match="in use"):
        await Server.start(server.address, TOKEN, {})
    await server.stop(0.0)


def test_addresses_that_others_could_listen_in_on_are_refused() -> None:
    for good in ("unix:/a/b", "127.0.0.1:1", "localhost:1", "[::1]:1", "127.8.8.8:0"):
        check_private(good)
    for bad in (
        "0.0.0.0:1",
        "10.0.0.1:1",
        "[::]:1",
        "example.com:1",
        "localhost.example.com:1",
        "dns:///localhost:1",
        "",
    ):
        with pytest.raises(UsageError, match="not encrypted"):
            check_private(bad)


def test_a_token_matches_itself_alone() -> None:
    token = ClusterToken.create()
    assert token.value not in repr(token) and len(token.value) >= 32
    assert token.matches(token.value)
    for other in (None, "", token.value[:-1], token.value + "x", "\ud800", "é"):
        assert not token.matches(other)
        assert not ClusterToken("").matches(other), "no token lets nobody in"


def test_a_token_file_is_private(tmp_path: Path) -> None:
    path, token = tmp_path / "token", JoinToken.create(bytes(32))
    path.write_text(token.text)
    path.chmod(0o600)
    assert JoinToken.read(path) == token
    path.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        JoinToken.read(path)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 2000, b"two\nlines" + b"x" * 40, b"\xff" * 40])
def test_a_token_file_that_holds_none_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="token file"):
        JoinToken.read(path)


def test_a_pipe_is_no_token_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    os.mkfifo(path, 0o600)
    with pytest.raises(UsageError, match=f"token file {path} cannot be read: not a regular file"):
        JoinToken.read(path)


def test_a_token_file_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(UsageError) as raised:
        JoinToken.read(path)
    assert str(raised.value) == (
        f"token file {path} cannot be read: No such file or directory; "
        "give the path of a readable copy of the file that `llamaclust up` names"
    )


async def test_a_deadline_names_what_did_not_come() -> None:
    with pytest.raises(DeadlineError, match=r"the answer took longer than 0\.01 s"):
        async with deadline("the answer", 0.01):
            await asyncio.Event().wait()
    with pytest.raises(TimeoutError, match="another"):
        async with deadline("the answer", 5.0):
            raise TimeoutError("another")


def test_grpc_is_tuned_without_a_word_on_standard_error() -> None:
    """gRPC would print a warning about unknown experiments."""
    program = (
        "from llamaclust.wire.rpc.grpc_options import tune_grpc; tune_grpc(); import os, asyncio, grpc;"
        "assert 'GRPC_EXPERIMENTS' in os.environ or not grpc.__version__.startswith('1.85.');"
        "grpc.insecure_channel('unix:/absent').close()"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GRPC_")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == ""
