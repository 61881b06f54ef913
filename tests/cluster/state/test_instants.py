"""Tests of deadlines of journalled requests while clocks are set."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from llamaclust.cluster.state.control_record import ControlRecord
from llamaclust.cluster.state.journal import Journal
from llamaclust.cluster.state.journal_records import Instant, RequestContext, read_journal

ADMITTED = Instant(unix_s=2e9, boot_s=50.0, machine="m")
LIMIT_S, DAY_S = 60.0, 86400.0
REQUEST = RequestContext(
    id="id",
    seed=1,
    created=7,
    endpoint="/v1/completions",
    body=b"{}",
    admitted=ADMITTED,
    limit_s=LIMIT_S,
)


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S, 365 * DAY_S, -365 * DAY_S])
async def test_a_clock_that_is_set_loses_no_request(tmp_path: Path, jump_s: float) -> None:
    async with aclosing(Journal(tmp_path / "journal", ControlRecord(), 60.0)) as journal:
        await journal.admit(REQUEST)
        journal.seal()
    restarted = Instant(ADMITTED.unix_s + jump_s, ADMITTED.boot_s + 20, "m")
    assert read_journal(tmp_path / "journal", restarted) == [REQUEST]
    assert REQUEST.left_s(restarted) == LIMIT_S - 20
    assert not read_journal(tmp_path / "journal", replace(restarted, boot_s=ADMITTED.boot_s + LIMIT_S))


def test_another_machine_measures_by_unix_time_and_never_more_than_the_limit() -> None:
    elsewhere = Instant(ADMITTED.unix_s + 20, 9.0, "another")
    assert REQUEST.left_s(elsewhere) == LIMIT_S - 20
    assert REQUEST.left_s(replace(elsewhere, unix_s=0.0)) == LIMIT_S


def test_clocks_are_those_of_this_machine() -> None:
    first, second = Instant.now(), Instant.now()
    assert first.machine == second.machine and 0 <= first.passed_s(second) < 60
