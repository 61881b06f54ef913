"""Tests of request targets and bodies, whose direct writes must equal those of h11."""

from __future__ import annotations

import h11
import pytest

from llamaclust.cluster.front.http.connections import EVENTS_A_TURN, MAX_HEADERS, HttpConnection

REQUEST = b"GET / HTTP/%b\r\nHost: a\r\n\r\n"


def begun(kind: type[h11.Connection], version: bytes, headers: list[tuple[bytes, bytes]]) -> h11.Connection:
    connection = kind(h11.SERVER, 65536)
    connection.receive_data(REQUEST % version)
    assert isinstance(connection.next_event(), h11.Request)
    connection.next_event()
    connection.send(h11.Response(status_code=200, headers=headers))
    return connection


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("headers", [[], [(b"Content-Length", b"71003")]], ids=["chunked", "length"])
def test_pieces_of_a_body_are_those_of_h11(version: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    ours, plain = (begun(kind, version, headers) for kind in (HttpConnection, h11.Connection))
    for data in (b"abc", b"", b"x" * 71000):
        assert ours.send(h11.Data(data=data)) == plain.send(h11.Data(data=data))
    assert ours.send(h11.EndOfMessage()) == plain.send(h11.EndOfMessage())
    with pytest.raises(h11.LocalProtocolError):
        ours.send(h11.Data(data=b"late"))


def test_a_body_longer_than_it_says_is_refused() -> None:
    connection = begun(HttpConnection, b"1.1", [(b"Content-Length", b"2")])
    with pytest.raises(h11.LocalProtocolError):
        connection.send(h11.Data(data=b"abc"))


@pytest.mark.parametrize(
    ("given", "target", "host"),
    [
        (b"/health?a=http://b/c", b"/health?a=http://b/c", b"a"),
        (b"http://b:8080/v1/models?x=1", b"/v1/models?x=1", b"b:8080"),
        (b"HTTPS://b", b"/", b"b"),
        (b"http://b?x=1", b"/?x=1", b"b"),
        (b"*", b"*", b"a"),
        (b"ftp://b/c", b"ftp://b/c", b"a"),
        (b"http:///c", b"http:///c", b"a"),
    ],
)
def test_a_target_with_a_host(given: bytes, target: bytes, host: bytes) -> None:
    """Checks that the host of an absolute target, like in requests to a proxy, replaces the header's host."""
    connection = HttpConnection(h11.SERVER, 65536)
    connection.receive_data(b"GET %b HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n" % given)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    assert (request.target, list(request.headers)) == (target, [(b"host", host), (b"x", b"y")])


def test_a_host_in_place_of_a_header() -> None:
    connection = HttpConnection(h11.SERVER, 65536)
    connection.receive_data(b"GET http://b/c HTTP/1.0\r\n\r\n")
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    assert (request.target, list(request.headers)) == (b"/c", [(b"host", b"b")])


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("lines", [MAX_HEADERS, MAX_HEADERS + 1, 10_000])
@pytest.mark.parametrize("is_whole", [True, False])
def test_heads_of_many_lines_are_refused(lines: int, end: bytes, is_whole: bool) -> None:
    """Checks that only the head's lines count, not those of the body."""
    head = [b"POST / HTTP/1.1", b"host: a", b"content-length: 900", *(lines - 3) * [b"a: b"]]
    body = end + 900 * b"\n" if is_whole else b""
    connection = HttpConnection(h11.SERVER, 65536)
    connection.receive_data(b"".join(line + end for line in head) + body)
    if lines > MAX_HEADERS:
        with pytest.raises(h11.RemoteProtocolError, match=f"more than {MAX_HEADERS} headers"):
            connection.next_event()
    else:
        assert isinstance(connection.next_event(), h11.Request) or not is_whole


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_large_heads_are_refused_even_in_one_piece(end: bytes, is_whole: bool) -> None:
    start = b"POST / HTTP/1.1" + end + b"host: a" + end + b"content-length: 9000" + end + b"a: "
    for size in (65_000, 66_000):
        connection = HttpConnection(h11.SERVER, 65536)
        connection.receive_data(start.ljust(size, b"b") + (2 * end + 9000 * b"c" if is_whole else b""))
        if size > 65536:
            with pytest.raises(h11.RemoteProtocolError, match="more than 65536 bytes"):
                connection.next_event()
        else:
            assert isinstance(connection.next_event(), h11.Request) or not is_whole


def chunked(size: int, count: int) -> bytes:
    head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + count * (b"%x\r\n%b\r\n" % (size, size * b"\n")) + b"0\r\n\r\n"


def pieces(connection: HttpConnection) -> tuple[int, int]:
    """Returns (pieces of the body, most pieces in one turn)."""
    every = most = 0
    while True:
        connection.begin_turn()
        before = every
        while (event := connection.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.EndOfMessage):
                return every, max(most, every - before)
            every += isinstance(event, h11.Data)
        assert connection.ended_turn, "all is there"
        most = max(most, every - before)


@pytest.mark.parametrize(("size", "count"), [(1, 4096), (16, 9000), (1000, 200)])
def test_a_connection_parses_so_many_pieces_in_a_turn(size: int, count: int) -> None:
    connection = HttpConnection(h11.SERVER, 65536)
    connection.receive_data(chunked(size, count))
    every, most = pieces(connection)
    assert every >= count and most == min(EVENTS_A_TURN, every)


@pytest.mark.parametrize("size", [1, 15])
def test_many_small_chunks_are_refused(size: int) -> None:
    connection = HttpConnection(h11.SERVER, 65536)
    connection.receive_data(chunked(size, 10_000))
    with pytest.raises(h11.RemoteProtocolError, match=f"4097 chunks with only {4097 * size} bytes"):
        pieces(connection)
