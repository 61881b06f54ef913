"""Tests of workers of another version, which are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cli.status import version_lines
from llamaclust.cluster.control.notices import version_text
from llamaclust.cluster.membership.join_rules import JoinRules, JoinSettings
from llamaclust.cluster.membership.members import Members
from llamaclust.cluster.server.status import worker_json
from llamaclust.core.version import VERSION
from llamaclust.proto import control_pb2
from llamaclust.wire.control.codec import decode_worker_message, encode_worker_message
from llamaclust.wire.control.messages import Register
from llamaclust.wire.security.credentials import Insecure
from support.clusters.command_line import CommandLine
from support.clusters.faults.worker_program import run_in_workers
from support.clusters.static_cluster import join_port, named, ready, start_coordinator, start_worker
from support.models.tiny_model import build_tiny_model
from support.wire.control_messages import REGISTER
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


@pytest.mark.parametrize("name", ["b", "worker-9", "east"])
def test_a_worker_that_sends_no_version_is_of_an_older_one(name: str) -> None:
    """Programs from before the field leave it out of the message."""
    sent = control_pb2.WorkerMessage()
    sent.ParseFromString(encode_worker_message(replace(REGISTER, name=name)))
    sent.register.ClearField("version")
    register = decode_worker_message(sent.SerializeToString())
    assert isinstance(register, Register) and register.version == ""
    worker = handle_of(name)
    worker.registration = register
    assert version_text(worker).startswith(
        f"worker {name} runs an older version of llamaclust, this coordinator {VERSION}: they work together"
    )
    shown = worker_json(worker, "m", {}, None)["version"]
    (text,) = version_lines({"version": VERSION, "workers": [{"name": name, "version": shown}]})
    assert text.startswith(f"versions of llamaclust differ: coordinator {VERSION}, {name} an older version; ")


@pytest.mark.parametrize("change", [{"protocol_version": 5}, {"protocol_version": 99}, {"numerics_version": 99}])
async def test_a_refusal_names_the_versions_that_are_known(change: dict[str, Any]) -> None:
    rules = JoinRules(Members(lambda *_: ""), JoinSettings(5.0), Insecure())
    for version, shown in (("", "an older version"), ("0.0.9", "0.0.9"), (NEWER, NEWER)):
        refusal = await rules.refusal(replace(REGISTER, version=version, **change), None)
        assert refusal is not None and refusal.endswith(f"everywhere ({shown} there, {VERSION} here)")
