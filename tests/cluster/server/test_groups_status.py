"""Tests the status of groups that hold stages: members, shares, and the members that gathers wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from llamaclust.cli.status import closed_port_lines, group_lines, idle_lines
from llamaclust.cluster.membership.worker_handle import WorkerHandle
from llamaclust.cluster.planner.plan import StagePrediction
from llamaclust.cluster.server.groups_status import groups_json
from llamaclust.cluster.server.status import worker_json
from llamaclust.wire.control.groups import GroupCounters, GroupMember, GroupOrder
from llamaclust.wire.control.messages import Heartbeat, Loaded, StageProgress
from support.wire.control_messages import LOAD
from support.wire.worker_handles import handle_of

BEAT = Heartbeat(0.5, 1, 1, 1, 1)


def group_of(
    names: str, shares: Sequence[int], counters: Sequence[GroupCounters | None], layers: tuple[int, int] = (0, 4)
) -> list[WorkerHandle]:
    members = tuple(GroupMember(name, f"unix:/run/{name}.l", share) for name, share in zip(names, shares, strict=True))
    handles = [handle_of(name) for name in names]
    for member, handle in enumerate(handles):
        group = GroupOrder(bytes(16), members, member)
        order = replace(LOAD, epoch=7, start=layers[0], end=layers[1], devices=(), group=group)
        handle.stages[7] = order, Loaded(7, 1, 1, 1)
        handle.heartbeat = replace(BEAT, stages=(StageProgress(7, 5, group=counters[member]),))
    return handles


def test_the_member_that_all_others_wait_for_is_named() -> None:
    counters = (
        GroupCounters(40, 1.5, (0.0, 0.5, 1.0), 1, 1, 4, 0.02),
        GroupCounters(40, 1.0, (0.25, 0.0, 0.75), 1, 1, 4, 0.5),
        GroupCounters(40, 1.0, (0.5, 0.5, 0.0), 1, 1, 4, 0.5),
    )
    workers = [*group_of("de", (1, 1), (None, None), (4, 8)), *group_of("abc", (2, 1, 1), counters), handle_of("idle")]
    first, second = groups_json(workers, LOAD.model_id, {"a": StagePrediction(0.01, 0.001, 0.004)})
    assert [(each["worker"], each["share"], each["waited_for_s"]) for each in first["members"]] == [
        ("a", 2, 0.75),
        ("b", 1, 1.0),
        ("c", 1, 1.75),
    ]
    assert (first["layers"], first["gathers"], first["waited_s"]) == ((0, 4), 40, 1.5)
    assert (first["gathers_ms"], first["predicted_gathers_ms"]) == (pytest.approx(5.0), pytest.approx(4.0))
    assert first["waits_most_for"] == "c"
    assert [member["worker"] for member in second["members"]] == ["d", "e"], "workers of before count nothing"
    assert second["gathers_ms"] is None and second["waits_most_for"] is None
    lines = [*group_lines((first, second))]
    assert lines[0].startswith(
        "a+b+c: layers [0, 4) in shares 2:1:1, 5.00 ms/token in gathers (predicted 4.00), slowest member c"
    )
    assert lines[1] == "d+e: layers [4, 8) in shares 1:1, ? ms/token in gathers (predicted ?)"


def test_a_member_that_is_lost_is_still_named() -> None:
    workers = group_of("ab", (1, 1), (GroupCounters(2, 0.5, (0.0, 0.5)), None))
    workers[1].lose("killed")
    (group,) = groups_json(workers, LOAD.model_id, {})
    assert [member["worker"] for member in group["members"]] == ["a", "b"]
    assert group["waits_most_for"] == "b"


def test_other_models_and_single_workers_have_no_groups() -> None:
    alone = handle_of("a")
    alone.stages[7] = replace(LOAD, epoch=7), Loaded(7, 1, 1, 1)
    assert groups_json([alone, handle_of("b")], LOAD.model_id, {}) == []
    assert groups_json(group_of("ab", (1, 1), (None, None)), "0" * 8, {}) == []


@pytest.mark.parametrize("closed", ["", "b", "ca", "abc"])
def test_workers_whose_port_is_closed_are_named(closed: str) -> None:
    workers = group_of("abc", (1, 1, 1), (None, None, None))
    for worker in workers:
        if worker.name in closed:
            worker.closed_port = f"worker x cannot connect to worker {worker.name}: open it in firewalls"
    values = [worker_json(worker, LOAD.model_id, {}, None) for worker in workers]
    assert [value["closed_port"] is not None for value in values] == [worker.name in closed for worker in workers]
    shown = [f"{name}: in no group of an automatic plan: worker x cannot connect to worker {name}" for name in closed]
    assert [line.partition(": open it")[0] for line in closed_port_lines(values)] == sorted(shown)


def test_idle_workers_are_listed_with_their_reasons() -> None:
    reasons = {"a": None, "b": "too little memory: it has 5 MiB, a stage of one layer needs 9 MiB", "c": "it is slower"}
    workers = [{"name": name, "idle_reason": reason} for name, reason in reasons.items()]
    expected = [f"{name}: not used: {reason}" for name, reason in reasons.items() if reason]
    assert [*idle_lines([*workers, {"name": "older"}])] == expected
