"""Lines of the journal near the most bytes that one may have."""

from __future__ import annotations

import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import pytest

from llamaclust.cluster.state import journal_records
from llamaclust.cluster.state.journal_records import admission_line, read_journal
from llamaclust.core.errors import RequestError
from support.clusters.journals import NOW, admission, journal

BODY = b'{"\xc3\xa9": "%0A%%\t\xff",\n\r\n}\t\n'


@pytest.mark.parametrize("more", [0, 1, 500, 700])
async def test_the_rest_of_a_line_that_is_too_long_is_no_line(
    tmp_path: Path, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's bytes could be made to look like another request's record."""
    path, forged = tmp_path / "journal", admission_line(admission(9, BODY))
    async with journal(path) as writing:
        await writing.admit(admission(1, BODY))
        written = path.read_bytes()
    monkeypatch.setattr(journal_records, "_MAX_LINE_BYTES", 600)
    path.write_bytes(written + b"a" * (600 + more) + forged + written.replace(b"id1", b"id2"))
    assert [request.admission.id for request in read_journal(path, NOW)] == ["id1"]
    path.write_bytes(b"a" * (600 + more) + forged + written)
    assert [request.admission.id for request in read_journal(path, NOW)] == ["id1"]


@pytest.mark.parametrize("body", [b"a" * 600, b"%" * 200, b"\n" * 200])
async def test_a_request_that_could_not_be_read_again_is_refused(
    tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_records, "_MAX_LINE_BYTES", 600)
    async with journal(tmp_path / "journal") as writing:
        with pytest.raises(RequestError, match=r"takes \d+ bytes in the journal, at most 599 are possible"):
            await writing.admit(admission(1, body))
        await writing.admit(admission(2, b"a"))
        assert [request.admission.id for request in read_journal(tmp_path / "journal", NOW)] == ["id2"]


@pytest.mark.parametrize("room", [0, 1])
async def test_what_is_admitted_at_the_limit_is_read_again(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = admission(1, b"a" * 300)
    monkeypatch.setattr(journal_records, "_MAX_LINE_BYTES", len(admission_line(longest)) + room)
    async with journal(tmp_path / "journal") as writing:
        with nullcontext() if room else pytest.raises(RequestError, match="send less at once"):
            await writing.admit(longest)
        found = [request.admission.id for request in read_journal(tmp_path / "journal", NOW)]
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
