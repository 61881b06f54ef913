"""Tests of journalled requests whose replies were sent: they are kept for a while, for clients that come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cluster.state.journal_records import read_journal
from support.clusters.journals import LIMIT_S, NOW, admission, ids_in, journal, left, row, until
from support.event_loop import pass_time

SENT_S = 600.0


async def test_requests_whose_replies_were_sent_are_kept_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    async with journal(path, sent_s=SENT_S) as writing:
        for number in range(3):
            await writing.admit(admission(number))
        writing.answer("id1", (0, 0), 0, [row(5)])
        for number in (0, 1):
            writing.sent(f"id{number}")
            writing.sent(f"id{number}")
        await until(lambda: ids_in(path, is_sent=True) == ["id0", "id1"])
        assert read_journal(path, NOW)[1] == left(admission(1), {(0, 0): [row(5)]}, is_sent=True)
        pass_time(monkeypatch, SENT_S)
        await until(lambda: ids_in(path, is_sent=True) == [] and ids_in(path, is_sent=False) == ["id2"])
        writing.sent("id2")
        pass_time(monkeypatch, SENT_S)
        await until(lambda: path.stat().st_size == 0)
    assert path.read_bytes() == b""


async def test_a_complete_request_in_the_background_is_kept_until_its_new_limit(tmp_path: Path) -> None:
    """The request outlives any number of coordinators, and is kept longer than sent replies."""
    path, late = tmp_path / "journal", replace(NOW, boot_s=NOW.boot_s + 2 * LIMIT_S)
    async with journal(path, sent_s=0.01) as writing:
        await writing.admit(replace(admission(0), is_background=True))
        await writing.admit(admission(1))
        writing.completed("id0", 3 * LIMIT_S)
        writing.sent("id1")
        await until(lambda: ids_in(path, is_sent=True) == ["id0"])
        writing.seal()
    for _ in range(2):
        async with journal(path, sent_s=0.01) as writing:
            await writing.restore([*read_journal(path, late), left(admission(2), is_sent=True)])
            await until(lambda: ids_in(path, is_sent=True) == ["id0"])
            writing.seal()
    assert read_journal(path, replace(NOW, boot_s=NOW.boot_s + 3 * LIMIT_S)) == []


async def test_requests_whose_replies_were_sent_are_bounded_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaclust.cluster.state.journal._SENT_BYTES", 7000)
    path = tmp_path / "journal"
    async with journal(path) as writing:
        for number in range(9):
            await writing.admit(admission(number, b"x" * 1000))
            writing.sent(f"id{number}")
        await writing.admit(admission(9))
        assert ids_in(path, is_sent=True) == ["id5", "id6", "id7", "id8"]
    assert ids_in(path, is_sent=True) == [] and ids_in(path, is_sent=False) == ["id9"]


async def test_sent_replies_that_are_computed_again_count_with_their_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamaclust.cluster.state.journal._SENT_BYTES", 7000)
    path, rows = tmp_path / "journal", [row(token) for token in range(50)]
    async with journal(path) as writing:
        await writing.restore([left(admission(number, b"x" * 1000), is_sent=True) for number in range(4)])
        for start in (0, 50, 100):
            writing.answer("id3", (0, 0), start, rows)
        await writing.admit(admission(4, b"x" * 1000))
        writing.sent("id4")
        await until(lambda: ids_in(path, is_sent=True) == ["id3", "id4"])


async def test_a_sent_reply_that_is_computed_again_is_open_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    async with journal(path, sent_s=SENT_S) as writing:
        for number in range(2):
            await writing.admit(admission(number))
            writing.sent(f"id{number}")
        await writing.begin_restored({"id0": 1})
        pass_time(monkeypatch, SENT_S)
        await until(lambda: ids_in(path, is_sent=True) == [])  # the time of id1 has passed
        assert ids_in(path, is_sent=False) == ["id0"]
    assert ids_in(path, is_sent=False) == ["id0"]
