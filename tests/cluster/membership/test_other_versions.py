"""Tests of workers of another version, which are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.cli.status import version_lines
from llamaclust.cluster.control.notices import version_text
from llamaclust.core.version import VERSION
from support.clusters.command_line import CommandLine
from support.clusters.faults.worker_program import run_in_workers
from support.clusters.static_cluster import join_port, named, ready, start_coordinator, start_worker
from support.models.tiny_model import build_tiny_model
from support.wire.worker_handles import handle_of

NEWER = "0.9.7+test"
_PROGRAM = """
from dataclasses import replace
from llamaclust.worker.membership import Member

join = Member.join

async def joins(member, coordinator, registration, *given, **others):
    await join(member, coordinator, replace(registration, {changes}), *given, **others)

Member.join = joins
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "tiny.gguf", layers=3, context=256)


def test_a_worker_of_another_version_serves_and_is_shown(
    line: CommandLine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's answers equal those of a cluster of one version."""
    with line.cluster(model, "alone") as alone:
        expected = alone.answer()
    run_in_workers(monkeypatch, tmp_path, _PROGRAM.format(changes=f"version={NEWER!r}"), "b")
    coordinator = start_coordinator(line, model, workers=named("a", "b"))
    port = join_port(coordinator)
    for name in "ab":
        start_worker(line, port, name)
    with ready(coordinator, line) as cluster:
        assert cluster.answer() == expected
        status = cluster.status
        assert status["version"] == VERSION
        assert {worker["name"]: worker["version"] for worker in status["workers"]} == {"a": VERSION, "b": NEWER}
        assert line.run("status", "--json").json["workers"][1]["version"] == NEWER
        shown = line.run("status").out
        assert f"versions of llamaclust differ: coordinator {VERSION}, a {VERSION}, b {NEWER}" in shown
        assert f"worker b runs llamaclust {NEWER}, this coordinator {VERSION}: they work together" in (
            coordinator.err.read_text()
        )


def test_equal_versions_are_not_mentioned() -> None:
    worker = handle_of("a")
    assert version_text(worker) == ""
    state = {"version": VERSION, "workers": [{"name": "a", "version": VERSION}]}
    assert [*version_lines(state)] == []
    (text,) = version_lines({**state, "version": "0.2.0"})
    assert text.startswith(f"versions of llamaclust differ: coordinator 0.2.0, a {VERSION}")
