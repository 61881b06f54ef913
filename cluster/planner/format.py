"""Formats a plan as text and as JSON values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import ceil, gcd
from typing import Any

from llamaclust.cluster.planner.plan import ANSWER_TOKENS, HeldLayers, Plan, Prediction, StagePlan
from llamaclust.cluster.planner.speculation import USUAL_ACCEPTANCES, SpeculationGain, predict_gain
from llamaclust.cluster.planner.work import TOGETHER
from llamaclust.core.gpus import ranges
from llamaclust.core.limits import layer_span, shard_position
from llamaclust.core.sizes import MIB
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.model.projectors.projector import Projector

_NOT_YET = "not measured yet; the first `llamaclust up` measures"
_MOST_SHARE = 12
_SPARSE = 0.75
"""The bytes read per token are printed only if they are less than this share of the weight bytes."""


def plan_json(plan: Plan, acceptances: Sequence[float] = USUAL_ACCEPTANCES) -> dict[str, Any]:
    values, predicted, other = asdict(plan), plan.prediction, plan.without_groups
    gains = _gains(plan, acceptances)
    del values["prediction"], values["least_kv_blocks"]
    values |= {
        **choice_json(plan),
        "context_length": plan.context_length,
        "token_ms": predicted and 1e3 * predicted.token_s,
        "links_ms": predicted and 1e3 * predicted.links_s,
        "gathers_ms": predicted and 1e3 * predicted.gathers_s,
        "ttft_ms": predicted and 1e3 * predicted.ttft_s,
        "tokens_per_s": predicted and predicted.tokens_per_s,
        "bottleneck": predicted and predicted.bottleneck,
        "without_groups": other and _speeds(other),
        "speculation": [asdict(gain) for gain in gains] or None,
    }
    times = [None] * len(plan.stages) if predicted is None else predicted.stages
    del values["expert_shards"]  # Borders inside layers become fractions below.
    stages = [
        _in_layers(asdict(stage), plan)
        | {
            "decode_ms": time and 1e3 * time.decode_s,
            "prefill_ms": time and 1e3 * time.prefill_s,
            "gathers_ms": time and 1e3 * time.gathers_s,
        }
        for stage, time in zip(plan.stages, times, strict=True)
    ]
    return values | {"stages": stages}


def choice_json(plan: Plan) -> dict[str, Any]:
    rejected, context = plan.rejected_group, plan.context
    return {
        "objective": plan.objective,
        "context": {
            "tokens": context.tokens,
            "trained": context.bounds.trained,
            "missing_bytes": context.missing_bytes,
            "text": context.text,
        },
        "prompt_tokens": plan.prompt_tokens,
        "rejected_group": rejected
        and {
            "workers": rejected.workers,
            "shares": rejected.shares,
            **_speeds(rejected.prediction),
            "reason": rejected.reason,
        },
        "no_group": plan.no_group or None,
        "no_images": plan.no_images or None,
    }


def choice_lines(values: Mapping[str, Any]) -> Iterator[str]:
    work = f"{values['prompt_tokens']} tokens of prompt, {ANSWER_TOKENS} of answer"
    yield {
        "latency": f"objective: latency (a request alone: {work})",
        "throughput": f"objective: throughput ({TOGETHER} requests at once, each {work})",
    }.get(values["objective"], "objective: none (the plan is by hand)")
    if context := values.get("context"):  # Older coordinators report none.
        yield f"context: {context['text']}"
    if group := values["rejected_group"]:
        who = f"{'+'.join(group['workers'])} in shares {shares_text(group['shares'])}"
        one, many = number_text(1e3 / group["token_ms"]), number_text(group["tokens_per_s"])
        yield f"not as a group ({who}: {one} tok/s for one request, {many} tok/s for many): {group['reason']}"
    elif values["no_group"]:
        yield f"no group is possible: {values['no_group']}"
    if values["no_images"]:
        yield f"images are not read: {values['no_images']}"


def _speeds(prediction: Prediction) -> dict[str, float]:
    return {
        "token_ms": 1e3 * prediction.token_s,
        "ttft_ms": 1e3 * prediction.ttft_s,
        "tokens_per_s": prediction.tokens_per_s,
    }


def _in_layers(stage: dict[str, Any], plan: Plan) -> dict[str, Any]:
    places = {key: shard_position(stage[key], plan.expert_shards) for key in ("start", "end")}
    devices = {"devices": [_in_layers(part, plan) for part in stage["devices"]]} if "devices" in stage else {}
    return stage | places | devices


def plan_lines(
    plan: Plan, acceptances: Sequence[float] = USUAL_ACCEPTANCES, unknown: str = _NOT_YET
) -> tuple[str, ...]:
    """Returns a plan as text. `unknown` says why speeds are unknown, if they are."""
    values = plan_json(plan)
    waits = {"between stages": values["links_ms"]} if len(plan.leaders) > 1 else {}
    if any(stage.shares for stage in plan.stages):
        waits["in gathers"] = values["gathers_ms"]
    parts = " and ".join(f"{number_text(ms)} {where}" for where, ms in waits.items())
    expected = [
        f"{number_text(values['token_ms'])} ms/token{f' ({parts})' if parts else ''}",
        *_prompts_and_requests(plan.prompt_tokens, values),
        f"bottleneck: {values['bottleneck'] or '?'}",
    ]
    other = values["without_groups"]
    single = (
        []
        if other is None
        else [f"{number_text(other['token_ms'])} ms/token", *_prompts_and_requests(plan.prompt_tokens, other)]
    )
    gap = plan.optimality_gap
    bound = [] if gap is None else [f"  within {max(1, ceil(100 * gap))} % of the best possible"]
    stages = zip(plan.stages, (stage["decode_ms"] for stage in values["stages"]), strict=True)
    idle_workers = (f"  {idle.worker}: not used: {idle.reason}" for idle in plan.idle_workers)
    unused_gpus = (f"  {gpu.device} of {gpu.worker} is unused: {gpu.reason}" for gpu in plan.unused_gpus)
    tokens = plan.kv_blocks * KV_BLOCK_TOKENS
    kv = f"  KV memory for {tokens} tokens, up to {plan.context_length} per sequence"
    if plan.window_blocks:
        kv += f"; for {plan.window_blocks * KV_BLOCK_TOKENS} tokens in layers with a sliding window"
    if plan.state_blocks:
        kv += f"; memory for {plan.state_blocks} sequence states"
    kv += f"; to run more than {_requests(tokens // plan.context_length)} of this length at once, set kv_memory"
    tiles = ["  some weights in wider tiles: more memory, less time (wide_tiles)"] if plan.wide_tiles else []
    lines = (line for stage, decode_ms in stages for line in _stage_lines(plan, stage, decode_ms))
    predicted = f"  predicted: {', '.join(expected)}"
    without = [f"  without groups: {', '.join(single)}"] if single else []
    unknowns = [f"  ?: {unknown}"] if "?" in predicted else []
    gains = _gain_lines(plan, acceptances)
    objective, context, *group = (f"  {line}" for line in choice_lines(values))
    speeds = (predicted, *without, *group, *unknowns, *gains, *bound)
    return ("plan:", *lines, *idle_workers, *unused_gpus, *tiles, kv, context, objective, *speeds)


def _prompts_and_requests(prompt_tokens: int, values: Mapping[str, Any]) -> list[str]:
    return [
        f"first token of a {prompt_tokens}-token prompt after {number_text(values['ttft_ms'])} ms",
        f"{number_text(values['tokens_per_s'])} tok/s for many requests",
    ]


def encoder_lines(plan: Plan, projector: Projector | None) -> Iterator[str]:
    for stage in plan.stages:
        if stage.encoder_bytes and projector is not None:
            yield f"  images: {projector.file.path.name} ({projector.name}), encoder on worker {stage.worker}"


def _gains(plan: Plan, acceptances: Sequence[float]) -> list[SpeculationGain]:
    predicted = plan.prediction
    gains = (None if predicted is None else predict_gain(predicted, acceptance) for acceptance in acceptances)
    return [gain for gain in gains if gain is not None]


def _gain_lines(plan: Plan, acceptances: Sequence[float]) -> Iterator[str]:
    if gains := _gains(plan, acceptances):
        first, *others = gains
        yield f"  speculation: {', '.join((_gain(first, ' of drafted tokens right'), *map(_gain, others)))}"
    elif plan.prediction is not None and plan.state_blocks:
        yield "  speculation: not predicted for layers with states"


def _gain(gain: SpeculationGain, right: str = "") -> str:
    share = f"with {100 * gain.acceptance:.3g} %{right}"
    if not gain.drafted_tokens:
        return f"no gain {share}"
    return f"{gain.gain:.1f}x {share} ({number_text(gain.tokens_per_s)} tok/s, drafts of {gain.drafted_tokens})"


def _stage_lines(plan: Plan, stage: StagePlan, decode_ms: float | None) -> Iterator[str]:
    shards = plan.expert_shards
    layers, figures = layer_span(stage.start, stage.end, shards), f"{_sizes(stage)}, {number_text(decode_ms)} ms/token"
    if stage.shares:
        if stage.member == 0:
            yield f"  {stage_name(plan, stage)}: layers {layers} in shares {shares_text(stage.shares)}"
        yield f"    {stage.worker}: {figures}"
        return
    yield f"  {stage.worker}: layers {layers}, {figures}"
    for part in stage.devices:
        moved = ranges(part.cpu_moe)
        if part.is_experts:
            yield f"    {part.device}: experts of layers {moved}, {_sizes(part)}"
        else:
            apart = f", experts of {moved} in RAM" if moved else ""
            if part.experts_cache_bytes:
                apart += f", up to {part.experts_cache_bytes // MIB} MiB for copies of some of them"
            yield f"    {part.device}: layers {layer_span(part.start, part.end, shards)}, {_sizes(part)}{apart}"


def stage_name(plan: Plan, stage: StagePlan) -> str:
    return next("+".join(workers) for workers in plan.chain if stage.worker in workers)


def shares_text(shares: Sequence[int]) -> str:
    """Formats shares as a ratio such as 2:1. Uses decimals, as in 1.1:1, if the whole numbers would be large."""
    unit, least = gcd(*shares), min(shares)
    if max(shares) <= _MOST_SHARE * unit:
        return ":".join(str(share // unit) for share in shares)
    return ":".join(f"{share / least:.2f}".rstrip("0").rstrip(".") for share in shares)


def _sizes(held: HeldLayers) -> str:
    parts = {"weights": held.weight_bytes, "KV": held.kv_bytes, "workspace": held.workspace_bytes}
    if isinstance(held, StagePlan) and held.encoder_bytes:
        parts["encoder"] = held.encoder_bytes
    sizes = " + ".join(f"{value / MIB:.0f} MiB {name}" for name, value in parts.items())
    if held.touched_bytes < _SPARSE * held.weight_bytes:
        sizes = sizes.replace("weights", f"weights ({held.touched_bytes / MIB:.0f} read a token)")
    room = "" if held.memory_bytes is None else f" of {held.memory_bytes / MIB:.0f} MiB"
    return f"{sizes} = {held.bytes / MIB:.0f}{room}"


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def number_text(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"
