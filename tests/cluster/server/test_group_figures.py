"""Checks that counts of a group's members agree with each other and with the stage's times."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.server.status import cluster_status
from llamaclust.cluster.state.directory import ClusterRecord
from llamaclust.model.groups.division import divide
from llamaclust.model.loader import Model
from llamaclust.model.steps.across import Gather
from llamaclust.wire.control.groups import GroupCounters
from support.clusters.recovering import Recovering, answer_of, config, model_in, recovering
from support.seed import SEED

TOKENS = 40


def gathers_of(model: Path, shares: tuple[int, ...]) -> int:
    with Model.open(model) as opened:
        program = divide(opened.program(0, opened.layer_count), shares, 0)
        return sum(isinstance(step, Gather) for step in program.steps)


@pytest.mark.parametrize("shares", [(2, 1), (1, 1), (1, 3, 2)])
async def test_members_count_the_same_gathers(shares: tuple[int, ...], tmp_path: Path) -> None:
    print(f"seed {SEED}")
    model, names = model_in(tmp_path), "abc"[: len(shares)]
    plan = [{"workers": [*names], "layers": [0, 6], "shares": [*shares]}]
    prompt = tuple((SEED + place) % 300 + 3 for place in range(30))
    settings = config(model, tmp_path, len(shares), plan=plan, speculative="off", timeouts={"worker": "60s"})
    async with recovering(settings) as run:
        await answer_of(run.cluster.engine.submit(GenerationRequest("one", prompt, TOKENS)))
        await run.until("counters of all steps", lambda: all(steps(run, name) == TOKENS for name in names))
        counted = [counters(run, name) for name in names]
        assert {each.gathers for each in counted} == {TOKENS * gathers_of(model, shares)}
        assert {each.one_row_steps for each in counted} == {TOKENS - 1}, "all but the prompt"
        assert sum(each.sent_bytes for each in counted) == sum(each.received_bytes for each in counted)
        for member, each in enumerate(counted):
            assert each.waited_for_s[member] == 0
            assert sum(each.waited_for_s) == pytest.approx(each.waited_s)
            assert 0 < each.one_row_waited_s <= each.waited_s * (1 + 1e-9), "a part, but for rounding"
        state = cluster_status(run.cluster, ClusterRecord("x", 1, "http://x", "m"))
        (group,), (stage,) = state["status"]["groups"], state["stages"]
        assert group["waited_s"] < stage["compute_ms"] * stage["microbatches"] / 1e3
        assert 0 < group["gathers_ms"] < stage["decode_ms"], "it is a part of the leader's time"
        workers = {worker["name"]: worker for worker in state["status"]["workers"]}
        assert [workers[name]["share"] for name in names] == [share / sum(shares) for share in shares]
        assert {workers[name]["decode_ms"] for name in names} == {stage["decode_ms"]}


def steps(run: Recovering, name: str) -> int:
    heartbeat = run.worker(name).heartbeat
    return 0 if heartbeat is None or not heartbeat.stages else heartbeat.stages[0].sent


def counters(run: Recovering, name: str) -> GroupCounters:
    heartbeat = run.worker(name).heartbeat
    assert heartbeat is not None
    found = heartbeat.stages[0].group
    assert found is not None
    return found
