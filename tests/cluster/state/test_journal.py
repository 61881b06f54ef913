"""Tests of the journal of admitted requests: what survives a coordinator, whatever happens to the file."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal_file import JournalFile
from llamaclust.cluster.state.journal_records import read_journal
from llamaclust.core.errors import SupersededError
from support.clusters.journals import LIMIT_S, NOW, admission, ids_in, journal, left, row, until
from support.seed import SEED

BODY = b'{"\xc3\xa9": "%0A%%\t\xff",\n\r\n}\t\n'
"""A body of arbitrary bytes."""


async def test_open_requests_are_found_in_order_with_their_tokens(tmp_path: Path) -> None:
    path, drawn = tmp_path / "journal", random.Random(SEED)
    rows = [row(token, drawn.getrandbits(20)) for token in range(100)]
    async with journal(path) as writing:
        await asyncio.gather(*(writing.admit(admission(number, BODY)) for number in range(5)))
        writing.answer("id1", (0, 0), 0, rows[:64])
        writing.answer("id1", (0, 1), 0, rows[:3])
        writing.answer("id1", (0, 0), 64, rows[64:])
        for number in (0, 3):
            writing.end(f"id{number}")
    answered = {(0, 0): rows, (0, 1): rows[:3]}
    assert read_journal(path, NOW) == [
        left(admission(number, BODY), answered if number == 1 else {}) for number in (1, 2, 4)
    ]
    assert read_journal(path, replace(NOW, boot_s=NOW.boot_s + LIMIT_S)) == []


async def test_nothing_stays_on_disk_of_requests_that_ended(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with journal(path) as writing:
        for number in range(3):
            await writing.admit(admission(number, b"a secret"))
            writing.end(f"id{number}")
    assert path.read_bytes() == b"" and path.stat().st_mode & 0o777 == 0o600


async def test_the_file_is_bounded_by_the_open_requests(tmp_path: Path) -> None:
    path, body = tmp_path / "journal", b"x" * (1 << 20)
    async with journal(path) as writing:
        await writing.admit(admission(0, b"first"))
        for number in range(1, 20):
            await writing.admit(admission(number, body))
            writing.end(f"id{number}")
            assert path.stat().st_size < 7 << 20
    assert [request.id for request in read_journal(path, NOW)] == ["id0"]


@pytest.mark.parametrize("kind", ["pipe", "link"])
async def test_what_is_in_the_way_of_a_new_file_goes(tmp_path: Path, kind: str) -> None:
    path, left, other = tmp_path / "journal", tmp_path / ".journal.new", tmp_path / "other"
    other.write_text("precious")
    if kind == "pipe":
        os.mkfifo(left)
    else:
        left.symlink_to(other)
    async with asyncio.timeout(60), journal(path) as writing:
        await writing.admit(admission(0))
        assert [request.id for request in read_journal(path, NOW)] == ["id0"]
    assert other.read_text() == "precious" and not left.exists()


async def test_a_restored_journal_holds_what_was_open_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    opened = [left(admission(0), {(0, 0): [row(5)]}), left(admission(1))]
    path.write_bytes(b"something else\n")
    async with journal(path) as writing:
        await writing.restore(opened)
        assert read_journal(path, NOW) == opened
        writing.answer("id0", (0, 0), 1, [row(6)])
        writing.end("id1")
    assert read_journal(path, NOW) == [left(admission(0), {(0, 0): [row(5), row(6)]})]


async def test_a_disk_that_cannot_be_written_to_stops_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "away"
    path = folder / "journal"
    async with journal(path) as writing:
        await writing.admit(admission(0))
        await writing.admit(admission(1))
        assert [record.message.partition(": ")[2] for record in caplog.records] == [
            "cannot be written: No such file or directory; requests are served, but are lost if the coordinator ends "
            "before the file can be written again"
        ]
        folder.mkdir()
        monkeypatch.setattr("llamaclust.cluster.state.journal._RETRY_S", 0.0)
        writing.end("id1")
        await writing.admit(admission(2))
        assert [request.id for request in read_journal(path, NOW)] == ["id0", "id2"]


@pytest.mark.parametrize("attempts", [0, 1, 3])
@pytest.mark.parametrize("last", ["an admission", "an end", "an answer"])
async def test_what_could_not_be_written_is_written_although_nothing_comes(
    attempts: int, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed coordinator would lose requests that wait for workers. `attempts` more writes fail."""
    folder, failures = tmp_path / "away", count()
    path, rewrite = folder / "journal", JournalFile.rewrite

    def counted(self: JournalFile, data: bytes) -> None:
        if next(failures) == attempts:
            folder.mkdir()
        rewrite(self, data)

    monkeypatch.setattr("llamaclust.cluster.state.journal._RETRY_S", 0.01)
    async with asyncio.timeout(60), journal(path) as writing:
        await writing.admit(admission(0))
        await writing.admit(admission(1))
        if last == "an end":
            writing.end("id1")
        elif last == "an answer":
            writing.answer("id0", (0, 0), 0, [row(5)])
        await until(lambda: not writing._writer._pending and writing._writer._writing is None)
        monkeypatch.setattr(JournalFile, "rewrite", counted)
        await until(path.exists)
        await until(lambda: writing._writer._failed_s is None)
        open_requests = ["id0"] if last == "an end" else ["id0", "id1"]
        assert [request.id for request in read_journal(path, NOW)] == open_requests


async def test_a_journal_that_another_coordinator_has_taken_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [OSError(28, "No space left on device"), SupersededError("taken over")]

    def failing(self: JournalFile, data: bytes) -> None:
        raise errors.pop(0)

    monkeypatch.setattr("llamaclust.cluster.state.journal._RETRY_S", 0.01)
    monkeypatch.setattr(JournalFile, "rewrite", failing)
    async with asyncio.timeout(60), journal(tmp_path / "journal") as writing:
        await writing.admit(admission(0))
        await until(lambda: writing._writer.is_sealed and writing._writer._writing is None)
        assert not errors and writing._writer._due is None


@pytest.mark.parametrize("is_away_for_ever", [False, True])
async def test_a_disk_that_hangs_stops_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, is_away_for_ever: bool
) -> None:
    """A disk that hangs stops no shutdown either: one request waits for it, others continue at once."""
    path, back, append = tmp_path / "journal", threading.Event(), JournalFile.append

    def hanging(self: JournalFile, data: bytes, is_synced: bool) -> bool:
        back.wait(60)
        return append(self, data, is_synced)

    monkeypatch.setattr("llamaclust.cluster.state.journal._RETRY_S", 0.0)
    try:
        async with asyncio.timeout(60), journal(path) as writing:
            await writing.admit(admission(0))
            monkeypatch.setattr("llamaclust.cluster.state.disk_thread._CALL_S", 0.2)
            monkeypatch.setattr(JournalFile, "append", hanging)
            for number in range(1, 4):
                await writing.admit(admission(number))
            assert [record.message.partition(": ")[2][:46] for record in caplog.records] == [
                "cannot be written: no answer within 0.2 s; req"
            ]
            if not is_away_for_ever:
                monkeypatch.setattr("llamaclust.cluster.state.disk_thread._CALL_S", 60.0)
                back.set()
                await until(lambda: not writing._writer._thread.hangs)
                await writing.admit(admission(4))
                assert len(read_journal(path, NOW)) == 5
    finally:
        back.set()


async def test_a_mistake_while_the_journal_is_written_stops_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(self: JournalFile, data: bytes) -> None:
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(JournalFile, "rewrite", mistaken)
    async with asyncio.timeout(60), journal(tmp_path / "journal") as writing:
        await writing.admit(admission(0))
    assert "cannot be written: TypeError('a mistake of ours')" in caplog.text


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none", NOW) == []


async def test_tokens_after_a_damaged_line_are_not_taken(tmp_path: Path) -> None:
    path, rows = tmp_path / "journal", [row(token) for token in range(9)]
    async with journal(path) as writing:
        await writing.admit(admission(0))
        for start in (0, 3, 6):
            writing.answer("id0", (0, 0), start, rows[start : start + 3])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join((*lines[:3], b"x" + lines[3][1:], *lines[4:])))
    assert read_journal(path, NOW) == [left(admission(0), {(0, 0): rows[:3]})]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "gone"])
async def test_a_file_that_is_replaced_is_written_anew(tmp_path: Path, kind: str) -> None:
    """The other file may be unreadable, or may block its reader."""
    path, other = tmp_path / "folder" / "journal", tmp_path / "other"
    path.parent.mkdir()
    other.write_text("of somebody else")
    async with journal(path) as writing:
        for number in range(2):
            await writing.admit(admission(number))
            path.unlink()
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "link":
                path.symlink_to(other)
            elif kind == "folder":
                path.mkdir()
                with pytest.raises(OSError, match="directory"):
                    read_journal(path, NOW)
                path.rmdir()
            if kind == "pipe":
                with pytest.raises(OSError, match="not a regular file"):
                    read_journal(path, NOW)
        await writing.admit(admission(2))
        assert [request.id for request in read_journal(path, NOW)] == ["id0", "id1", "id2"]
        assert other.read_text() == "of somebody else"


async def test_a_long_journal_is_read_in_little_more_time_than_its_json(tmp_path: Path) -> None:
    """Lines have one token, like those of slow streams; the time is relative to `json`, by this thread's clock."""
    path = tmp_path / "journal"
    async with journal(path) as writing:
        await writing.admit(admission(0))
        for token in range(5000):
            writing.answer("id0", (0, 0), token, [row(token, token)])
    lines = [line.split(b" ", 2)[2] for line in path.read_bytes().splitlines()[2:]]

    def seconds(work: Callable[[], object]) -> float:
        begun_s = time.thread_time()
        work()
        return time.thread_time() - begun_s

    json_s = min(seconds(lambda: [json.loads(line) for line in lines]) for _ in range(5))
    reading_s = min(seconds(lambda: read_journal(path, NOW)) for _ in range(5))
    assert len(read_journal(path, NOW)[0].answered[0, 0]) == 5000
    assert reading_s < 4 * json_s, f"{reading_s:.3f} s, {json_s:.3f} s for the JSON"


async def test_a_sealed_journal_leaves_everything_to_the_next_coordinator(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with journal(path) as writing:
        for number in range(2):
            await writing.admit(admission(number))
        writing.sent("id0")
        writing.seal()
        writing.end("id1")
        writing.answer("id1", (0, 0), 0, [row(5)])
        with pytest.raises(SupersededError, match="has stopped serving"):
            await writing.admit(admission(2))
    assert ids_in(path, is_sent=True) == ["id0"] and ids_in(path, is_sent=False) == ["id1"]


async def test_a_superseded_coordinator_does_not_touch_its_successors_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal"
    record = ControlRecord.begin(tmp_path / "control.json")
    async with journal(path, record) as writing:
        await writing.admit(admission(0))
        newer = ControlRecord.begin(tmp_path / "control.json")
        assert (record.newer_term(), newer.newer_term()) == (2, 0)
        async with journal(path, newer) as successor:
            await successor.restore(read_journal(path, NOW))
            with pytest.raises(SupersededError, match="has stopped serving"):
                for number in (5, 6):  # the first admission detects it
                    await writing.admit(admission(number))
            writing.end("id0")
            with pytest.raises(SupersededError, match="newer coordinator"):
                await record.drain(frozenset({"a"}))
            successor.answer("id0", (0, 0), 0, [row(5)])
    assert read_journal(path, NOW) == [left(admission(0), {(0, 0): [row(5)]})]
    assert (ControlRecord.begin(tmp_path / "control.json").term, newer.drained) == (3, frozenset())
    assert [entry.message.partition(": ")[2] for entry in caplog.records if entry.levelname == "ERROR"] == [
        "a newer coordinator (term 2) owns this file; this coordinator stops writing"
    ]


async def test_tokens_before_the_admission_leave_those_that_follow_out(tmp_path: Path) -> None:
    """Those tokens are computed again, and no others take their places."""
    path, rows = tmp_path / "journal", [row(token) for token in range(4)]
    async with journal(path) as writing:
        writing.answer("id0", (0, 0), 0, rows[:2])
        await writing.admit(admission(0))
        writing.answer("id0", (0, 0), 2, rows[2:])
    assert read_journal(path, NOW) == [left(admission(0))]


async def test_restores_count_until_a_token_is_added(tmp_path: Path) -> None:
    """A restore that an orderly stop ends does not count."""
    path = tmp_path / "journal"
    async with journal(path) as writing:
        await writing.restore([left(admission(number), restores=2) for number in range(4)])
        await writing.begin_restored({"id0": 3, "id1": 3, "id2": 3, "gone": 1})
        assert [request.restores for request in read_journal(path, NOW)] == [3, 3, 3, 2]
        for number in (1, 2):
            writing.progressed(f"id{number}")
        writing.answer("id1", (0, 0), 0, [row(5)])
        await writing.begin_restored({"id3": 3})
        assert [request.restores for request in read_journal(path, NOW)] == [3, 0, 0, 3]
        writing.stop_in_order()
        writing.seal()
    assert [request.restores for request in read_journal(path, NOW)] == [2, 0, 0, 2]


async def turns() -> None:
    """Lets the event loop run all that is due."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_admissions_at_about_the_same_time_share_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that nothing waits for are written with them; a single admission is written at once."""
    path, append, appended = tmp_path / "journal", JournalFile.append, []

    def counted(self: JournalFile, data: bytes, is_synced: bool) -> bool:
        appended.append((data.count(b"\n"), is_synced))
        return append(self, data, is_synced)

    monkeypatch.setattr(JournalFile, "append", counted)
    monkeypatch.setattr("llamaclust.cluster.state.journal._PAUSE_S", 3600.0)
    monkeypatch.setattr("llamaclust.cluster.state.journal._LATER_S", 3600.0)
    async with journal(path) as writing:
        await writing.restore([])
        for number in (0, 1):
            writing._writer._begun_s = -math.inf  # the pause is over
            await writing.admit(admission(number))
        assert appended == [(1, True), (1, True)]
        admitted = [writing.admit(admission(2))]
        await turns()
        writing.answer("id2", (0, 0), 0, [row(5)])
        writing.sent("id1")
        admitted.append(writing.admit(admission(3)))
        await turns()
        assert len(appended) == 2 and writing._writer._writing is None
        writing._writer._write()  # the pause is over
        await asyncio.gather(*admitted)
        assert appended[2:] == [(4, True)]
        writing._writer._begun_s = -math.inf
        writing.end("id3")
        await turns()
        assert len(appended) == 3 and writing._writer._writing is None
    assert [request.id for request in read_journal(path, NOW)] == ["id0", "id2"]
