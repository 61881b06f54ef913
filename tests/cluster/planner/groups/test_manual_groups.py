"""Tests of manual plans in which several workers hold a stage together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llamaclust.cluster.config.cluster_config import ClusterConfig
from llamaclust.cluster.control.limits import check_plan
from llamaclust.cluster.control.planning import ClusterResources, plan_cluster
from llamaclust.cluster.control.resources.resource_shares import WorkerResources
from llamaclust.cluster.control.serving import Serving
from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.links import violated_pair
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.plan import Plan
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.core.errors import DisputeError, InsufficientMemoryError, NetworkPartitionError, UsageError
from llamaclust.core.sizes import MIB
from llamaclust.model.loader import Model
from support.models.tiny_architectures import build_architecture
from support.plans.plan_inputs import REQUEST, SMALL, group_costs, worker

WORKERS = [worker(name) for name in "abcde"]
GROUPED = replace(REQUEST, group_costs=partial(group_costs, SMALL))


def planned(*entries: Assignment, memory_mib: int = 10_000) -> Plan:
    workers = [replace(each, memory_bytes=memory_mib * MIB) for each in WORKERS]
    return make_plan(SMALL, workers, replace(GROUPED, manual=entries))


MIXED = (Assignment(("b", "a"), 0, 8, (2, 1)), Assignment(("c",), 8, 9), Assignment(("d", "e"), 9, 12, (1, 1)))


def test_each_member_has_an_entry() -> None:
    plan = planned(*MIXED)
    entries = [(stage.worker, stage.start, stage.end, stage.shares, stage.member) for stage in plan.stages]
    assert entries == [
        ("b", 0, 8, (2, 1), 0),
        ("a", 0, 8, (2, 1), 1),
        ("c", 8, 9, (), 0),
        ("d", 9, 12, (1, 1), 0),
        ("e", 9, 12, (1, 1), 1),
    ]
    assert plan.chain == (("b", "a"), ("c",), ("d", "e"))
    assert [stage.worker for stage in plan.leaders] == ["b", "c", "d"]


@pytest.mark.parametrize("shares", [(1, 1), (2, 1), (5, 3, 2), (1, 1, 1, 1)])
def test_members_have_their_portions_of_layers_and_the_leader_the_embedding(shares: tuple[int, ...]) -> None:
    alone = planned(Assignment(("a",), 0, 12)).stages[0]
    members = planned(Assignment(tuple("abcde"[: len(shares)]), 0, 12, shares)).stages
    for member, share in zip(members, shares, strict=True):
        part, embedding_bytes = share / sum(shares), 20 * MIB if member is members[0] else 0
        assert member.weight_bytes == pytest.approx(embedding_bytes + part * (alone.weight_bytes - 20 * MIB), rel=1e-3)
        assert member.touched_bytes == pytest.approx(part * alone.touched_bytes, rel=1e-3)
        assert member.kv_bytes == pytest.approx(part * alone.kv_bytes, rel=1e-3)


def test_a_group_has_room_where_no_member_has() -> None:
    with pytest.raises(InsufficientMemoryError):
        planned(Assignment(("a",), 0, 12), memory_mib=150)
    assert planned(Assignment(("a", "b"), 0, 12, (1, 1)), memory_mib=150).kv_blocks > 0
    message = r"75% of layers \[0, 12\) on worker 'a' need 1\d\d MiB .*, it has 130 MiB: \d+ MiB are missing"
    with pytest.raises(InsufficientMemoryError, match=message):
        planned(Assignment(("a", "b"), 0, 12, (3, 1)), memory_mib=130)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Assignment(("a", "x"), 0, 12, (1, 1))], "unknown worker 'x'"),
        (
            [Assignment(("a", "a"), 0, 12, (1, 1))],
            "worker 'a' has layers [0, 12) and [0, 12); give each worker one range",
        ),
        (
            [Assignment(("a", "b"), 0, 6, (1, 1)), Assignment(("b",), 6, 12)],
            "worker 'b' has layers [0, 6) and [6, 12); give each worker one range",
        ),
        (
            [Assignment(("a", "b", "c"), 0, 7, (1, 1, 1)), Assignment(("d", "e"), 6, 12, (1, 1))],
            "layers [6, 7) of workers 'd' and 'e' are assigned twice; workers 'a', 'b' and 'c' have [0, 7)",
        ),
        (
            [Assignment(("a", "b"), 0, 13, (1, 1))],
            "workers 'a' and 'b' cannot have layers [0, 13), because the model has layers [0, 12)",
        ),
    ],
)
def test_wrong_groups_are_refused(entries: list[Assignment], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        planned(*entries)
    assert message in str(caught.value)


def test_members_and_leaders_are_neighbours() -> None:
    chain = planned(*MIXED).chain
    neighbours = {"ab", "bc", "cd", "de", "bd"}
    for one in "abcde":
        for other in "abcde":
            pair = frozenset((one, other))
            expected = "".join(sorted(pair)) in neighbours
            assert (violated_pair(chain, frozenset({pair})) == pair) == expected, pair
    with pytest.raises(NetworkPartitionError, match="workers a and b"):
        make_plan(SMALL, WORKERS, replace(GROUPED, manual=MIXED, partitions=frozenset({frozenset("ab")})))


@pytest.mark.parametrize(("pair", "is_refused"), [("ab", True), ("de", True), ("bc", False), ("ad", False)])
def test_members_that_accuse_each_other_are_refused(pair: str, *, is_refused: bool) -> None:
    request = replace(GROUPED, manual=MIXED, disputes=frozenset({frozenset(pair)}))
    if is_refused:
        with pytest.raises(DisputeError, match=f"workers {pair[0]} and {pair[1]} accuse each other, but are in one"):
            make_plan(SMALL, WORKERS, request)
    else:
        assert make_plan(SMALL, WORKERS, request).chain == planned(*MIXED).chain


def test_another_plan_by_shares_is_another_plan() -> None:
    def pair(*shares: int) -> Plan:
        return planned(Assignment(("a", "b"), 0, 12, shares))

    serving = Serving(pair(1, 1), ())
    assert serving.has_layers_as(pair(1, 1))
    assert not serving.has_layers_as(pair(2, 1))
    assert not serving.has_layers_as(planned(Assignment(("b", "a"), 0, 12, (1, 1))))
    assert not serving.has_layers_as(planned(Assignment(("a",), 0, 12)))


def test_text_and_json_tell_members_and_shares() -> None:
    plan = planned(*MIXED)
    lines = plan_lines(plan)
    assert lines[1] == "  b+a: layers [0, 8) in shares 2:1"
    assert [line.split(":")[0] for line in lines[2:7]] == ["    b", "    a", "  c", "  d+e", "    d"]
    stages = plan_json(plan)["stages"]
    assert [(stage["worker"], stage["shares"], stage["member"]) for stage in stages][:2] == [
        ("b", (2, 1), 0),
        ("a", (2, 1), 1),
    ]


GROUP: list[dict[str, Any]] = [{"workers": ["a", "b"], "layers": [0, 2]}, {"worker": "c", "layers": [2, 5]}]


def config(**values: Any) -> ClusterConfig:
    own = {"model": "m.gguf", "workers": [{"name": name} for name in "abc"], "context_length": 64, "plan": GROUP}
    return ClusterConfig.model_validate(own | values)


def test_a_cluster_file_has_groups(tmp_path: Path) -> None:
    with Model.open(build_architecture(tmp_path / "m.gguf", "smollm3")) as model:
        check_plan(config(), model)
        check_plan(config(plan=[{**GROUP[0], "shares": [2, 1]}, GROUP[1]]), model)
        workers = {name: WorkerResources(name, 1 << 30) for name in "abc"}
        plan = plan_cluster(config(), model, ClusterResources(workers, {}))
        assert plan.chain == (("a", "b"), ("c",))
        assert [stage.shares for stage in plan.stages] == [(1, 1), (1, 1), ()]


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("granitehybrid", {}, "layers of this model have recurrent states"),
        ("lfm2", {}, "layers of this model have recurrent states"),
        ("qwen3", {"workers": [{"name": name, "kv_disk": "1GiB"} for name in "abc"]}, "kv_disk is set"),
        ("qwen2moe", {"workers": [{"name": "a"}, {"name": "b", "device": "cuda:0"}, {"name": "c"}]}, "b has cuda:0"),
    ],
)
def test_what_groups_do_not_do_is_refused(tmp_path: Path, name: str, values: Any, problem: str) -> None:
    with Model.open(build_architecture(tmp_path / "m.gguf", name)) as model:
        with pytest.raises(UsageError, match=f"plan: the group of a, b: .*{problem}.*") as caught:
            layers = model.layer_count
            own = {"plan": [{"workers": ["a", "b"], "layers": [0, layers]}]}
            check_plan(config(**(own | values)), model)
        assert "\n" not in str(caught.value)
