"""Tests of journal lines: damaged ones, those of other versions, and those near the largest size."""

from __future__ import annotations

import asyncio
import json
import random
import tracemalloc
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cluster.state import journal_records
from llamaclust.cluster.state.journal_records import left_unanswered, read_journal, to_line
from llamaclust.core.errors import RequestError
from support.clusters.journals import NOW, admission, journal, left, row
from support.seed import SEED

BODY = b'{"\xc3\xa9": "%0A%%\t\xff",\n\r\n}\t\n'


async def test_a_torn_or_damaged_line_loses_no_other(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with journal(path) as writing:
        for number in range(3):
            await writing.admit(admission(number))
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        complete = whole[:length].count(b"\n") + (length < len(whole) and whole[length : length + 1] == b"\n")
        assert len(read_journal(path, NOW)) == max(0, complete - 1), length  # the first line is no request
    drawn = random.Random(SEED)
    for _ in range(50):
        damaged = bytearray(whole)
        place = drawn.randrange(len(whole))
        damaged[place] ^= 1 << drawn.randrange(8)
        path.write_bytes(damaged)
        found = {request.id for request in read_journal(path, NOW)}
        assert len(found) >= 1 and found <= {"id0", "id1", "id2"}


@pytest.mark.parametrize(("line", "is_named"), [(0, True), (1, True), (2, True), (3, False), (None, False)])
async def test_damage_before_the_last_line_is_logged(
    tmp_path: Path, line: int | None, is_named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal"
    async with journal(path) as writing:
        for number in range(3):
            await writing.admit(admission(number))
    lines = path.read_bytes().splitlines(keepends=True)
    if line is not None:
        lines[line] = b"x" + lines[line][1:]
    path.write_bytes(b"".join(lines))
    assert len(read_journal(path, NOW)) == 3 - (line in (1, 2, 3))
    named = f"{path}: 1 damaged lines were skipped; the first of them is line {(line or 0) + 1}"
    assert (named in caplog.text) is is_named and bool(caplog.records) is is_named


async def test_a_line_that_is_none_of_ours_loses_no_other(tmp_path: Path) -> None:
    """The line's checksum is right: another program, or another version, wrote it."""
    path = tmp_path / "journal"
    async with journal(path) as writing:
        await writing.admit(admission(0))
        writing.answer("id0", (0, 0), 0, [row(1), row(2)])
    whole = json.loads(to_line(admission(1)).split(b" ", 2)[2])
    wrong: list[object] = [None, [], {"a": 1}]
    tokens = {"id": "id0", "prompt": 0, "choice": 0, "start": 2, "rows": ""}
    foreign: list[tuple[str, object]] = [
        *((kind, value) for kind in ("RequestContext", "Change") for value in (*wrong, 7, "id0")),
        *(("RequestContext", {**whole, name: value}) for name in {*whole} - {"scales"} for value in wrong),
        *(("RequestContext", {**whole, "earlier": earlier}) for earlier in (7, "", "7", "[7]", "[" * 100_000)),
        *(("Change", {**tokens, name: value}) for name in tokens for value in (*wrong, 1.5)),
        *(("Change", {**tokens, "rows": rows}) for rows in ("AAAA", "A", "!", "AAAA" * 5)),
        *(("Change", {"id": "id0", "restores": times}) for times in ("often", 1e999, "1e999")),
        ("Change", {"id": [], "is_sent": True}),
        ("RequestContext", "[" * 100_000),
        *(("Later", {"id": "id0"}), ("", {})),
    ]
    lines = [f"{kind} {json.dumps(value)}".encode() for kind, value in foreign] + [b"Change " + b"[" * 100_000]
    with path.open("ab") as file:
        file.write(b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines))
    assert read_journal(path, NOW) == [left(admission(0), {(0, 0): [row(1), row(2)]})]


@pytest.mark.parametrize("number", range(4))
async def test_lines_of_any_content_do_no_harm(tmp_path: Path, number: int) -> None:
    """The checksums are right, and requests that are read from such lines can be written again."""
    path, drawn = tmp_path / "journal", random.Random(f"{SEED} {number}")
    async with journal(path) as writing:
        await asyncio.gather(*(writing.admit(admission(number, BODY)) for number in range(3)))
        writing.answer("id0", (0, 0), 0, [row(1), row(2)])
        await writing.begin_restored({"id1": 2})
        writing.sent("id2")
        writing.seal()
    head, *lines = path.read_bytes().splitlines()
    for _ in range(200):
        texts = [_changed(line[9:], drawn) for line in lines]
        path.write_bytes(b"\n".join((head, *(b"%08x %b" % (zlib.crc32(text), text) for text in texts))))
        for request in read_journal(path, NOW):
            assert all(to_line(record) for record in request.records())


def _changed(text: bytes, drawn: random.Random) -> bytes:
    changed = bytearray(text)
    for _ in range(drawn.randrange(4)):
        place = drawn.randrange(len(changed) + 1)
        more = drawn.choice((b"{", b'"', b"[", b"null", b"1e999", b"-", b"\xff", b"\\ud800", b",", b"9" * 30))
        changed[place : place + drawn.randrange(9)] = drawn.choice((more, b"", drawn.randbytes(1), changed[:9]))
    return bytes(changed).replace(b"\n", b"")


@pytest.mark.parametrize(
    "first", [b"llamaclust journal 1", b"llamaclust journal 3", b'{"admit":["id1"]}', b"RequestContext {}"]
)
async def test_a_journal_of_another_version_is_refused(tmp_path: Path, first: bytes) -> None:
    path = tmp_path / "journal"
    async with journal(path) as writing:
        await writing.admit(admission(1, BODY))
        head, admitted = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"%08x %b\n" % (zlib.crc32(first), first) + admitted)
        with pytest.raises(ValueError, match="another version of llamaclust wrote it"):
            read_journal(path, NOW)
        assert left_unanswered(path) == ""
        path.write_bytes(b"x" + head[1:] + admitted)  # damaged, but not another version
        assert [request.id for request in read_journal(path, NOW)] == ["id1"]


@pytest.mark.parametrize("text", ["é", "\ud800", "a\n\t\0\x7f", '"\\'])
async def test_messages_of_an_earlier_chat_are_found_as_they_were(tmp_path: Path, text: str) -> None:
    messages: list[dict[str, object]] = [{"role": "user", "content": text}, {text: [1, 0.1, None, {"a": True}]}]
    async with journal(tmp_path / "journal") as writing:
        await writing.admit(replace(admission(1), earlier=messages))
        (found,) = read_journal(tmp_path / "journal", NOW)
        assert found.earlier == messages


@pytest.mark.parametrize("more", [0, 1, 500, 700])
async def test_the_rest_of_a_line_that_is_too_long_is_no_line(
    tmp_path: Path, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's bytes could be made to look like another request's record."""
    path, forged = tmp_path / "journal", to_line(admission(9, BODY))
    async with journal(path) as writing:
        await writing.admit(admission(1, BODY))
        written = path.read_bytes()
    monkeypatch.setattr(journal_records, "_MAX_LINE_BYTES", 600)
    path.write_bytes(written + b"a" * (600 + more) + forged + written.replace(b"id1", b"id2"))
    assert [request.id for request in read_journal(path, NOW)] == ["id1"]
    path.write_bytes(b"a" * (600 + more) + forged + written)
    assert [request.id for request in read_journal(path, NOW)] == ["id1"]


@pytest.mark.parametrize("body", [b"a" * 600, b"\xff" * 300, b"\n" * 400])
async def test_a_request_that_could_not_be_read_again_is_refused(
    tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_records, "_MAX_LINE_BYTES", 600)
    async with journal(tmp_path / "journal") as writing:
        with pytest.raises(RequestError, match=r"takes \d+ bytes in the journal, but at most 599 are"):
            await writing.admit(admission(1, body))
        await writing.admit(admission(2, b"a"))
        assert [request.id for request in read_journal(tmp_path / "journal", NOW)] == ["id2"]


@pytest.mark.parametrize("room", [0, 1])
async def test_what_is_admitted_at_the_limit_is_read_again(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = admission(1, b"a" * 300)
    monkeypatch.setattr(journal_records, "_MAX_LINE_BYTES", len(to_line(longest)) + room)
    async with journal(tmp_path / "journal") as writing:
        with nullcontext() if room else pytest.raises(RequestError, match="send a shorter request"):
            await writing.admit(longest)
        found = [request.id for request in read_journal(tmp_path / "journal", NOW)]
    assert found == (["id1"] if room else [])


def test_long_lines_are_not_held_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # a gap of zeros
    tracemalloc.start()
    try:
        assert read_journal(path, NOW) == []
        assert tracemalloc.get_traced_memory()[1] < 512 << 20
    finally:
        tracemalloc.stop()
