"""Tests of requests that a coordinator left unanswered: what its end and the next start say and do."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.cluster.front.http.connections import ApiPort
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.server import serve
from llamaclust.cluster.server.front import Front
from llamaclust.cluster.state.directory import ClusterDir, ClusterRecord
from llamaclust.cluster.state.events import Event, Notice
from llamaclust.cluster.state.journal_records import Instant, left_unanswered
from support.clusters.journals import admission, journal

DROPPED = "dropped, because the model, its settings or the version have changed"


async def leave(folder: ClusterDir, *served: str, sent: int = 0) -> None:
    """Writes a journal with a request for each of these digests, and others whose replies were sent."""
    folder.create()
    async with journal(folder.journal) as writing:
        for number, digest in enumerate((*served, *("ours" for _ in range(sent)))):
            await writing.admit(replace(admission(number), served=digest, admitted=Instant.now()))
            if number >= len(served):
                writing.sent(f"id{number}")
        await writing.admit(replace(admission(99), served="ours", limit_s=0.0))  # too old
        writing.seal()


@pytest.mark.parametrize(
    ("unanswered", "line"),
    [
        (0, ""),
        (1, "1 unanswered request is computed again at the next start"),
        (3, "3 unanswered requests are computed again at the next start"),
    ],
)
async def test_the_end_of_a_coordinator_counts_what_it_leaves(tmp_path: Path, unanswered: int, line: str) -> None:
    folder = ClusterDir(tmp_path / "home")
    await leave(folder, *("ours" for _ in range(unanswered)), sent=2)
    assert left_unanswered(folder.journal) == line


def test_the_end_of_a_coordinator_without_a_journal_says_nothing(tmp_path: Path) -> None:
    assert left_unanswered(tmp_path / "none") == left_unanswered(tmp_path) == ""


@pytest.mark.parametrize(
    ("served", "restored", "line"),
    [
        ((), 0, None),
        (("ours",), 1, "1 unanswered request is computed again"),
        (("ours", "theirs", "ours"), 2, f"2 unanswered requests are computed again; 1 unanswered request is {DROPPED}"),
        (("theirs", "theirs"), 0, f"2 unanswered requests are {DROPPED}"),
    ],
)
async def test_a_start_restores_what_it_can_answer_and_counts_it(
    tmp_path: Path, served: tuple[str, ...], restored: int, line: str | None
) -> None:
    folder, events = ClusterDir(tmp_path / "home"), list[Event]()
    await leave(folder, *served, sent=1)
    record = ClusterRecord("home", os.getpid(), "http://127.0.0.1:1", "m")
    with socket.socket() as listener:
        front = Front(ApiPort(listener), record, ApiSettings(), None, events.append)
        api: Any = SimpleNamespace(continues=lambda request: request.served == "ours")
        requests = await serve._restorable(folder, [api], front)
    assert [request.served for request in requests] == ["ours"] * (restored + 1)  # with the one that was sent
    assert events == ([] if line is None else [Notice(f"home: {line}")])
