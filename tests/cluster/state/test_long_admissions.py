"""Tests of long requests in the journal: a thread makes their lines, in the order of events."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cluster.state import journal as journal_module
from llamaclust.cluster.state import journal_records
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Record, read_journal, to_line
from llamaclust.core.errors import RequestError
from support.clusters.journals import NOW, admission, journal, left, row
from support.seed import SEED

LONG = b"x" * (1 << 16)


class Making:
    """Makes journal lines; those of id0 wait for `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.on_loop: list[str] = []
        monkeypatch.setattr(journal_module, "to_line", self.to_line)

    def to_line(self, record: Record) -> bytes:
        if threading.current_thread() is threading.main_thread():
            self.on_loop.append(record.id)
        elif record.id == "id0":
            self.begun.set()
            assert self.go.wait(60)
        return to_line(record)

    async def wait_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, 20)


def lines_in(path: Path) -> list[tuple[str, str]]:
    """Returns the kind and the request id of each line."""
    texts = [line.split(b" ", 2) for line in path.read_bytes().splitlines()[1:]]
    return [(kind.decode(), json.loads(fields)["id"]) for _, kind, fields in texts]


def happen(writing: Journal) -> list[asyncio.Future[None]]:
    admitted = [writing.admit(admission(0, LONG)), writing.admit(admission(1))]
    writing.answer("id0", (0, 0), 0, [row(5)])
    writing.answer("id1", (0, 0), 0, [row(6)])
    writing.sent("id1")
    admitted.append(writing.admit(admission(2, LONG)))
    writing.end("id1")
    return admitted


ALL = [("RequestContext", "id0"), ("RequestContext", "id1"), ("Change", "id0"), ("Change", "id1"), ("Change", "id1")]
ALL += [("RequestContext", "id2"), ("Change", "id1")]


async def test_a_long_line_is_made_beside_the_event_loop_and_the_order_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, making = tmp_path / "journal", Making(monkeypatch)
    async with journal(path) as writing:
        await writing.restore([left(admission(9))])
        admitted = happen(writing)
        await making.wait_begun()
        assert not any(each.done() for each in admitted) and lines_in(path) == [("RequestContext", "id9")]
        making.go.set()
        async with asyncio.timeout(60):
            await admitted[0]
            assert ("RequestContext", "id0") in lines_in(path)
            await asyncio.gather(*admitted)
        writing.seal()
    assert making.on_loop == ["id1", "id0", "id1", "id1", "id1"]
    assert lines_in(path) == [("RequestContext", "id9"), *ALL]
    opened = [left(admission(9)), left(admission(0, LONG), {(0, 0): [row(5)]}), left(admission(2, LONG))]
    assert read_journal(path, NOW) == opened


async def test_the_file_stays_until_all_lines_of_restored_requests_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    async with journal(path) as writing:
        for number in range(3):
            await writing.admit(admission(number, LONG))
        writing.seal()
    before, making = path.read_bytes(), Making(monkeypatch)
    monkeypatch.setattr(journal_module, "_LATER_S", 0.0)
    async with journal(path) as writing:
        opened = [left(admission(number, LONG), is_sent=number > 0) for number in (1, 2, 0)]
        restoring = asyncio.create_task(writing.restore(opened))
        await making.wait_begun()
        for _ in range(10):
            await asyncio.sleep(0)
        assert writing._writer._writing is None and path.read_bytes() == before
        making.go.set()
        await restoring
        assert read_journal(path, NOW) == opened


@pytest.mark.parametrize("is_sealed", [False, True])
async def test_a_journal_is_closed_with_all_that_it_took(
    is_sealed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, making = tmp_path / "journal", Making(monkeypatch)
    async with journal(path) as writing:
        admitted = happen(writing)
        await making.wait_begun()
        if is_sealed:
            writing.seal()
        closing = asyncio.create_task(writing.aclose())
        await asyncio.sleep(0)
        assert not closing.done()
        making.go.set()
        async with asyncio.timeout(60):
            await closing
        assert all(each.done() for each in admitted)
    assert [request.id for request in read_journal(path, NOW)] == ["id0", "id2"]


async def test_a_long_request_that_could_not_be_read_again_is_refused_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_records, "_MAX_LINE_BYTES", 1 << 16)
    async with journal(tmp_path / "journal") as writing:
        refused, taken = writing.admit(admission(0, LONG)), writing.admit(admission(1))
        writing.answer("id0", (0, 0), 0, [row(5)])
        with pytest.raises(RequestError, match=r"takes \d+ bytes in the journal, but at most 65535 are"):
            await refused
        await taken
        assert read_journal(tmp_path / "journal", NOW) == [left(admission(1))]


@pytest.mark.parametrize("more", range(-2, 3))
async def test_what_is_encoded_in_parts_is_read_as_it_was(more: int, tmp_path: Path) -> None:
    drawn, size = random.Random(f"{SEED} {more}"), 2 * journal_records._PART_BYTES + more
    messages: list[dict[str, object]] = [
        {"role": "user", "content": '"\\' * 9},
        {"role": "tool", "é\ud800": [{}, None]},
    ]
    images = {'https://a/\u20ac?"': drawn.randbytes(size), "b": b"", "c": b"\xff"}
    request = replace(admission(0, drawn.randbytes(size)), earlier=messages, images=images)
    async with journal(tmp_path / "journal") as writing:
        await writing.admit(request)
        assert read_journal(tmp_path / "journal", NOW) == [left(request)]
