"""Predicts the speed of a plan: seconds per token, time to the first token, throughput and bottleneck."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.devices import PlannedLayers, devices_of
from llamaclust.cluster.planner.links import COORDINATOR, Links
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.plan import Plan, Prediction, Round, StagePlan, StagePrediction
from llamaclust.cluster.planner.stage_parts import GroupCostsOf, HeldStage, StageParts, held_by_group
from llamaclust.cluster.planner.work import CHUNKS
from llamaclust.cluster.scheduler.microbatching import cycle_ns
from llamaclust.cluster.scheduler.speculation.costs import counts_to_try

_NS = 1e9


@dataclass(frozen=True, slots=True)
class _Path:
    round_s: float  # Seconds from the first stage through all others and back to the first.
    there_s: float  # Seconds from the coordinator through all stages and back.
    row_s: tuple[float, ...]  # Seconds per row on each link between stages.

    @classmethod
    def of(cls, split: Sequence[HeldStage], links: Links) -> _Path:
        leaders = [stage.leader for stage in split]
        crossing_bytes = [int(stage.costs.border_bytes[stage.end]) for stage in leaders[:-1]]
        ring = links.round([stage.worker for stage in leaders])
        ends = [links.between(COORDINATOR, leaders[0].worker), links.between(leaders[-1].worker, COORDINATOR)]
        return cls(
            round_s=sum(link.one_way_s for link in ring),
            there_s=sum(link.one_way_s for link in (*ring[:-1], *ends)),
            row_s=tuple(link.byte_s * n_bytes for link, n_bytes in zip(ring[:-1], crossing_bytes, strict=True)),
        )

    @property
    def token_s(self) -> float:
        return self.round_s + sum(self.row_s)


def predict(
    split: Sequence[HeldStage],
    prompt_tokens: int,
    max_sequences: int,
    links: Links,
    *,
    max_drafted: int = 0,
    may_chain: bool = True,
) -> Prediction:
    """Predicts the speed of a plan, whose workers must all be measured. `may_chain` means that drafted tokens may be
    sent before the results of earlier drafted tokens are known."""
    path = _Path.of(split, links)
    times = [time for stage in split for time in _times(stage, prompt_tokens)]
    slowest = max(times, key=lambda time: time[1].decode_s)
    return Prediction(
        stages=tuple(time for _, time in times),
        token_s=sum(stage.decode_s() for stage in split) + path.token_s,
        links_s=path.token_s,
        gathers_s=sum(stage.gathers.decode_s(1) for stage in split),
        ttft_s=min(_ttft_s(split, prompt_tokens, chunks, path) for chunks in CHUNKS),
        tokens_per_s=max(_tokens_per_s(split, max_sequences, groups, path) for groups in CHUNKS),
        bottleneck=slowest[0],
        rounds=tuple(_round(split, drafted, path, may_chain=may_chain) for drafted in counts_to_try(max_drafted)),
    )


def _times(stage: HeldStage, prompt_tokens: int) -> Iterator[tuple[str, StagePrediction]]:
    decode, prefill = stage.member_decode_s(), stage.member_prefill_s(prompt_tokens)
    gathers_s = stage.gathers.decode_s(1)
    for member, decode_s, prefill_s in zip(stage.members, decode, prefill, strict=True):
        yield member.worker, StagePrediction(decode_s, prefill_s / prompt_tokens, gathers_s)


def predict_again(
    costs: StageCosts,
    plan: Plan,
    workers: Mapping[str, WorkerFacts],
    max_sequences: int,
    links: Links,
    group_costs: GroupCostsOf | None = None,
) -> Prediction | None:
    """Predicts an existing plan's speed from new measurements. Returns None if a device is absent or unmeasured."""
    if any(not _is_known(stage, workers) for stage in plan.stages):
        return None
    split = [_stage_again(costs, stages, workers, links, group_costs) for stages in plan.by_stage]
    drafted = () if plan.prediction is None else plan.prediction.rounds
    most = drafted[-1].drafted if drafted else 0
    may_chain = not drafted or drafted[-1].slowest_s < drafted[-1].seconds
    return predict(split, plan.prompt_tokens, max_sequences, links, max_drafted=most, may_chain=may_chain)


def _is_known(stage: StagePlan, workers: Mapping[str, WorkerFacts]) -> bool:
    held = _held(stage, workers)
    return bool(held) and all(part.device.profile is not None for part in held)


def _stage_again(
    costs: StageCosts,
    stages: Sequence[StagePlan],
    workers: Mapping[str, WorkerFacts],
    links: Links,
    group_costs: GroupCostsOf | None,
) -> HeldStage:
    first = stages[0]
    if not first.shares:
        return HeldStage((StageParts(first.worker, _held(first, workers), costs),))
    assert group_costs is not None
    held = {stage.worker: _held(stage, workers) for stage in stages}
    entry = Assignment((*held,), first.start, first.end, first.shares)
    return held_by_group(entry, lambda name, *_: held[name], group_costs, links)


def _held(stage: StagePlan, workers: Mapping[str, WorkerFacts]) -> tuple[PlannedLayers, ...]:
    if stage.worker not in workers:
        return ()
    devices = {device.device: device for device in devices_of(workers[stage.worker])}
    if any(part.device not in devices for part in stage.devices) or (not stage.devices and "cpu" not in devices):
        return ()
    if not stage.devices:
        return (PlannedLayers(devices["cpu"], stage.start, stage.end),)
    return tuple(
        PlannedLayers(devices[part.device], part.start, part.end, part.cpu_moe, part.is_experts)
        for part in stage.devices
    )


def _ttft_s(split: Sequence[HeldStage], prompt_tokens: int, chunks: int, path: _Path) -> float:
    rows = -(-prompt_tokens // chunks)
    times = [stage.prefill_s(rows, concurrent=chunks > 1) for stage in split]
    sent = [rows * ms for ms in path.row_s]
    head_s = split[-1].decode_s() - split[-1].prefill_s(1)
    return sum(times) + sum(sent) + (chunks - 1) * max(*times, *sent, 0.0) + max(head_s, 0.0) + path.there_s


def _round(split: Sequence[HeldStage], drafted: int, path: _Path, *, may_chain: bool) -> Round:
    rows = 1 + drafted
    stages = [stage.decode_s(rows) for stage in split]
    links = [rows * row_s for row_s in path.row_s]
    seconds = sum(stages) + sum(links) + path.there_s
    return Round(drafted, seconds, max(*stages, *links, 0.0) if may_chain else seconds)


def _tokens_per_s(split: Sequence[HeldStage], sequences: int, groups: int, path: _Path) -> float:
    rows = -(-sequences // groups)
    times = [stage.decode_s(rows, concurrent=groups > 1) * _NS for stage in split]
    sent_s = rows * sum(path.row_s)
    cycle = cycle_ns(times, groups, (path.round_s + sent_s) * _NS)
    return sequences / max(cycle, 1.0) * 1e9  # Workers report their own times, so the cycle may be 0.
