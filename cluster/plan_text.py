"""A plan for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llamaclust.cluster.plan import Plan, StagePlan
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.sizes import MIB


def plan_json(plan: Plan) -> dict[str, Any]:
    """Every figure of the plan; layers half-open, sizes in bytes, what nobody measured is null."""
    return asdict(plan)


def plan_lines(plan: Plan) -> tuple[str, ...]:
    """One line a stage, then what to expect; `?` for what nobody measured."""
    expected = [
        f"{_number(plan.token_ms)} ms/token",
        f"first token of a 512-token prompt after {_number(plan.ttft_ms)} ms",
        f"{_number(plan.tokens_per_s)} tok/s for many requests",
        f"limited by {plan.limiting or '?'}",
    ]
    spares = (f"  {spare.worker}: not used: {spare.reason}" for spare in plan.spares)
    kv = f"  KV memory for {plan.kv_blocks * KV_BLOCK_TOKENS} tokens, {plan.context_length} per sequence at most"
    return ("plan:", *map(_stage_line, plan.stages), *spares, kv, f"  predicted: {', '.join(expected)}")


def _stage_line(stage: StagePlan) -> str:
    parts = {"weights": stage.weight_bytes, "KV": stage.kv_bytes, "workspace": stage.workspace_bytes}
    sizes = " + ".join(f"{value / MIB:.0f} MiB {name}" for name, value in parts.items())
    room = "" if stage.memory_bytes is None else f" of {stage.memory_bytes / MIB:.0f} MiB"
    layers = f"layers [{stage.start}, {stage.end})"
    return f"  {stage.worker}: {layers}, {sizes} = {stage.bytes / MIB:.0f}{room}, {_number(stage.decode_ms)} ms/token"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"
