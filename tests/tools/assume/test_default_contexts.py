"""Checks the default context of public models on assumed machines. `-s` prints the table."""

from __future__ import annotations

import random

import pytest

from llamaclust.cluster.planner.plan import Plan
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.sizes import MIB
from llamaclust.tools.assume.assumed_model import assumed_model
from llamaclust.tools.assume.description import parse_machines
from llamaclust.tools.assume.planning import AssumedCluster
from support.seed import SEED

MODELS = (
    "smollm2-135m-instruct",
    "qwen2.5-0.5b-instruct",
    "llama-3.2-3b-instruct",
    "qwen3-4b",
    "8b",
    "gemma-3-12b-it",
    "gpt-oss-20b",
    "mistral-small-3.2-24b-instruct",
    "qwen3-30b-a3b",
    "70b",
)
MACHINES = ("8GB@40GB/s", "16GB@40GB/s", "64GB@40GB/s")
OTHERS = ("2x8GB@40GB/s", "16GB@60GB/s + rtx3060", "3x16GB@40GB/s,1Gbit", "64GB@60GB/s + 24GB@900GB/s gpu")
AGENT_TOKENS = 17_900  # Tokens of the longest first request of a coding agent.


def planned(model: str, machines: str, *overrides: str) -> Plan | str:
    try:
        return AssumedCluster.of(parse_machines(machines), overrides).plan(assumed_model(model))
    except InsufficientMemoryError as error:
        return str(error)


def layers_of(plan: Plan) -> list[object]:
    return [(stage.worker, stage.start, stage.end, stage.shares, stage.device_layers) for stage in plan.stages]


@pytest.mark.parametrize("model", MODELS)
def test_what_ran_with_4096_tokens_runs_with_the_default_in_the_same_layers(model: str) -> None:
    for machines in (*MACHINES, *random.Random(SEED).sample(OTHERS, 2)):
        before, plan = planned(model, machines, "context_length=4096"), planned(model, machines)
        if isinstance(before, str) or isinstance(plan, str):
            assert before == plan and "does not fit" in str(plan)
            print(f"| {model} | {machines} | does not fit | | |")
            continue
        assert layers_of(plan) == layers_of(before) and plan.prediction == before.prediction
        assert plan.context_length >= 4096 and 16 * plan.kv_blocks >= plan.context_length
        kv, total = (sum(getattr(stage, name) for stage in plan.stages) / MIB for name in ("kv_bytes", "bytes"))
        least = sum(stage.kv_bytes for stage in before.stages) / MIB
        print(f"| {model} | {machines} | {plan.context.text} | {least:.0f} -> {kv:.0f} | {total:.0f} |")


@pytest.mark.parametrize(
    ("model", "machines"), [("qwen3-4b", "16GB@40GB/s"), ("8b", "16GB@40GB/s"), ("70b", "64GB@40GB/s")]
)
def test_usual_machines_have_room_for_coding_agents(model: str, machines: str) -> None:
    plan = planned(model, machines)
    assert isinstance(plan, Plan) and plan.context_length > AGENT_TOKENS
