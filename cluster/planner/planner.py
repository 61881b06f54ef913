"""Decides which worker holds which layers, and says what that should bring. Pure.

`throughput`: the slowest stage is as fast as can be, at a mix of work that has the head (on the last stage) in its
decode part: 512 tokens of prompt and 128 of answer for each of eight sequences that run together. `latency`: the
computing time per token is within 10 % of the least one, and of such cuts it is the one where a percent more of it has
made the slowest stage three percent faster. So workers that are alike share the layers, since they cost no more than a
hop, and slower ones stay spares unless memory needs them. Of cuts that are equal, the one with fewer stages. There is
room for the keys and values of some whole contexts, but for one alone where that makes a tenth of the time.

Workers stand in the file's order unless another one is clearly better. Without measurements of every worker all are
taken to be alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from llamaclust.cluster.planner.adjacency import Pairs, names_in, split, ways_apart
from llamaclust.cluster.planner.costs import StageCosts, Table, WorkerFacts
from llamaclust.cluster.planner.devices import devices_of
from llamaclust.cluster.planner.idle_workers import spares
from llamaclust.cluster.planner.links import Links
from llamaclust.cluster.planner.manual import Assignment, checked
from llamaclust.cluster.planner.memory import PlanLimits, Sizes
from llamaclust.cluster.planner.plan import DevicePlan, Plan, StagePlan, usual_prompt_tokens
from llamaclust.cluster.planner.predict import StageParts, predict
from llamaclust.cluster.planner.search import Best, best_cut
from llamaclust.cluster.planner.shortage import cut_does_not_fit, does_not_fit
from llamaclust.cluster.planner.worker_classes import Kind, kinds_of
from llamaclust.cluster.planner.workspace import Rounding, Workspace, no_rounding
from llamaclust.core.errors import NetworkPartitionError
from llamaclust.core.profile import DeviceProfile
from llamaclust.model.loader import ModelCosts

_ANSWER_TOKENS = 128
_TOGETHER = 8
_AIMS = {"throughput": (0, np.inf), "latency": (3, 1.1)}
"""(percent by which a percent more time per token makes the slowest stage faster at least, most of its least time)."""

_STAGE_S = 1e-9
"""Decides between cuts that take as long."""

_WORTH_ROOM = 1.1
"""Less room for keys and values, though for a whole context, has to make a plan faster by so much."""

_NOMINAL_CPU = DeviceProfile(read_bytes_s=20e9, int8_macs_s=300e9)
_NOMINAL_GPU = DeviceProfile(read_bytes_s=500e9, int8_macs_s=50e12)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is asked of a plan."""

    context_length: int
    max_sequences: int
    workspace: Workspace
    objective: str = "latency"  # latency | throughput
    manual: tuple[Assignment, ...] | None = None
    kv_memory_bytes: int | None = None  # per worker, at most; None: up to half of what weights and workspace leave
    links: Links = field(default_factory=Links)
    apart: Pairs = frozenset()  # who cannot reach each other: no neighbours
    max_batch_tokens: int = 0  # of a microbatch
    rounding: Rounding = no_rounding


def make_plan(costs: ModelCosts, workers: Sequence[WorkerFacts], ask: PlanRequest) -> Plan:
    """Raises UsageError for a plan by hand that is wrong, InsufficientMemoryError with the missing MiB,
    NetworkPartitionError where only `apart` is in the way."""
    stages = StageCosts.of(costs)
    room = ask.kv_memory_bytes, ask.max_batch_tokens, ask.rounding
    limits = PlanLimits(ask.context_length, ask.max_sequences, ask.workspace, *room)
    sizes = Sizes(stages, limits)
    if ask.manual is not None:
        by_hand = checked(ask.manual, [worker.name for worker in workers], stages.layers)
        _check_apart([name for name, _, _ in by_hand], ask.apart)
        found = _Found(by_hand, contexts=1, excess=None)
    else:
        found = _automatic(stages, sizes, workers, ask.objective, ask.apart)
    by_name = {worker.name: worker for worker in workers}
    stage_parts = [
        StageParts(name, sizes.held(by_name[name], start, end, found.contexts)) for name, start, end in found.cut
    ]
    cut = [part for stage in stage_parts for part in stage.parts]
    kv_blocks = sizes.kv_blocks(cut)
    if kv_blocks < sizes.limits.context_blocks:
        raise cut_does_not_fit(sizes, cut)
    used = {name for name, _, _ in found.cut}
    prompt_tokens = usual_prompt_tokens(ask.context_length)
    measured = _measured([worker for worker, _, _ in cut])
    return Plan(
        stages=tuple(_stage(sizes, by_name[stage.worker], stage, kv_blocks) for stage in stage_parts),
        kv_blocks=kv_blocks,
        window_blocks=sizes.window_blocks(kv_blocks),
        context_length=ask.context_length,
        spares=spares(sizes, workers, used, by_hand=ask.manual is not None, contexts=found.contexts, apart=ask.apart),
        prediction=predict(stages, stage_parts, prompt_tokens, ask.max_sequences, ask.links) if measured else None,
        excess=found.excess,
    )


def _stage(sizes: Sizes, worker: WorkerFacts, stage: StageParts, kv_blocks: int) -> StagePlan:
    parts = tuple(
        DevicePlan(
            device=device.device,
            start=start,
            end=end,
            weight_bytes=sizes.stages.weight_bytes(start, end),
            kv_bytes=sizes.kv_bytes(start, end, kv_blocks),
            workspace_bytes=sizes.workspace_bytes(device, start, end),
            memory_bytes=device.memory_bytes,
        )
        for device, start, end in stage.parts
    )
    rooms = [worker.memory_bytes] if not worker.gpus else [device.memory_bytes for device in devices_of(worker)]
    return StagePlan(
        worker=worker.name,
        start=parts[0].start,
        end=parts[-1].end,
        weight_bytes=sum(part.weight_bytes for part in parts),
        kv_bytes=sum(part.kv_bytes for part in parts),
        workspace_bytes=sum(part.workspace_bytes for part in parts),
        memory_bytes=None if None in rooms else sum(room or 0 for room in rooms),
        devices=parts if worker.gpus else (),
    )


def _measured(workers: Sequence[WorkerFacts]) -> bool:
    devices = (device for worker in workers for device in devices_of(worker))
    return all(device.profile is not None for device in devices)


@dataclass(frozen=True, slots=True)
class _Found:
    cut: tuple[Assignment, ...]
    contexts: int  # for so many whole contexts there is KV memory at least
    excess: float | None  # see `Plan`


def _check_apart(ring: Sequence[str], apart: Pairs) -> None:
    if (pair := split(ring, apart)) is not None:
        raise NetworkPartitionError(
            f"every plan has workers {' and '.join(sorted(pair))} side by side, who cannot reach each other"
        )


def _automatic(
    stages: StageCosts, sizes: Sizes, workers: Sequence[WorkerFacts], objective: str, apart: Pairs = frozenset()
) -> _Found:
    if not _measured(workers):
        workers = [_nominal(worker) for worker in workers]
    weight, slack = _AIMS[objective]
    chosen: tuple[Best, int] | None = None
    before: list[Kind] = []
    for contexts in sizes.wanted_contexts:
        kinds = kinds_of(workers, partial(_times, stages, sizes, contexts), names_in(apart))
        if chosen is not None and all(map(Kind.costs_as, kinds, before)):
            break  # memory is not what decides
        before = kinds
        ways = ways_apart(kinds, [worker.name for worker in workers], apart) if apart else None
        best = best_cut(kinds, weight, slack, ways)
        if best is not None and (chosen is None or _is_worth(best, chosen[0], objective)):
            chosen = best, contexts
    if chosen is not None:
        best, contexts = chosen
        cut = tuple((workers[index].name, start, end) for index, start, end in best.cut.stages)
        return _Found(cut, contexts, best.excess)
    if apart:
        found = _automatic(stages, sizes, workers, objective)
        _check_apart([name for name, _, _ in found.cut], apart)
        return found
    raise does_not_fit(sizes, workers)


def _is_worth(less_room: Best, more_room: Best, objective: str) -> bool:
    """Whether it is so much faster where there is room for fewer contexts: fewer layers beside a GPU, say."""
    fast, slow = less_room.cut, more_room.cut
    if objective == "latency":
        return fast.total * _WORTH_ROOM < slow.total
    return fast.slowest * _WORTH_ROOM < slow.slowest


def _nominal(worker: WorkerFacts) -> WorkerFacts:
    gpus = tuple(replace(gpu, profile=_NOMINAL_GPU) for gpu in worker.gpus)
    return replace(worker, profile=_NOMINAL_CPU, gpus=gpus)


def _times(stages: StageCosts, sizes: Sizes, contexts: int, worker: WorkerFacts) -> tuple[Table, Table]:
    """(seconds of the mix of work where the stage fits, seconds of one token) of each stage on a worker."""
    prompt_tokens = usual_prompt_tokens(sizes.limits.context_length)
    answers = _ANSWER_TOKENS / _TOGETHER
    over = partial(sizes.over_devices, worker, contexts)

    def mix_of(*, concurrent: bool) -> Table:
        return over(
            lambda device: (
                stages.prefill_table(device, prompt_tokens, concurrent=concurrent)
                + stages.decode_table(device, _TOGETHER, concurrent=concurrent) * answers
            )
        )

    mix = mix_of(concurrent=True)
    mix[0, stages.layers] = mix_of(concurrent=False)[0, stages.layers]  # no other stage computes then
    fits = sizes.missing_table(worker, contexts) == 0
    prompt_bytes = prompt_tokens * stages.hidden_bytes
    others = np.ones_like(mix)
    others[0, stages.layers] = 0  # a stage of all layers has no links
    sent_s = others * 2 * worker.reach.byte_s * prompt_bytes  # in and out, while it computes
    hops_s = others * 2 * worker.reach.one_way_s
    return np.where(fits, np.maximum(mix, sent_s), np.inf), over(stages.decode_table) + hops_s + _STAGE_S
