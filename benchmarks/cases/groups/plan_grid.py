from __future__ import annotations

import itertools
import json
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import process_time

from runner.case import Case, Group, Measures, option
from runner.options import natural, positive

from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError
from llamaclust.tools.assume.assumed_model import AssumedModel, assumed_model
from llamaclust.tools.assume.description import parse_machines
from llamaclust.tools.assume.planning import AssumedCluster, prediction_of, room_bytes
from llamaclust.tools.assume.rates import read_bytes_s

_MODELS = (
    *("llama-3.2-1b-instruct", "llama-3.2-3b-instruct", "8b", "qwen2.5-14b-instruct", "gemma-3-27b-it", "70b"),
    *("gpt-oss-20b", "qwen3-30b-a3b", "gpt-oss-120b"),
)
_COUNTS = (2, 3, 4, 6, 8)
_NETWORKS = tuple(itertools.product((0.1, 1, 2.5, 10, 25), (0.1, 0.4, 2, 10)))
"""Pairs of Gbit/s and round-trip time in ms."""
_MEMORIES = (4, 8, 16, 24, 32, 64, 128)
_WORSE = 1.03
_ALL = 3


@dataclass(frozen=True, slots=True)
class _Case:
    machines: str
    model: str


Entry = dict[str, object]


def _grid() -> list[_Case]:
    cases = []
    for number, (model, count, (gbit, ms)) in enumerate(itertools.product(_MODELS, _COUNTS, _NETWORKS)):
        if number % 3:  # Only a third of the combinations become cases.
            continue
        source = random.Random(number)
        file_bytes = assumed_model(model).file.size_bytes
        needed = source.choice((1.15, 1.6, 3.0)) * file_bytes / count + (3 << 30)
        memory = next((gib for gib in _MEMORIES if gib << 30 >= needed), _MEMORIES[-1])
        speed = source.choice((15, 25, 40, 80))
        groups = [f"{count}x{memory}GB@{speed}GB/s"]
        if source.random() < 0.6:
            groups = [
                f"{memory * source.choice((1, 1, 2))}GB@{speed * source.choice((1, 1.5, 2, 3)):g}GB/s"
                for _ in range(count)
            ]
        cases.append(_Case(f"{'+'.join(groups)},{gbit:g}Gbit,{ms:g}ms", model))
    return cases


class _Alternatives:
    def __init__(self, cluster: AssumedCluster, model: AssumedModel, source: random.Random) -> None:
        self._source = source
        self._layers = model.opened.layer_count
        machines = cluster.assumed.machines
        self._speeds = [read_bytes_s(machine.cpu) for machine in machines]
        self._rooms = [max(1.0, float(room_bytes(machine) - (600 << 20))) for machine in machines]
        self._layer_bytes = 1.05 * model.file.size_bytes / self._layers

    def plans(self) -> Iterator[list[Entry]]:
        for chain in self._chains():
            shares = [self._shares(group) for group in chain]
            for cuts in self._cuts(chain):
                yield [self._entry(*stage) for stage in zip(chain, shares, cuts, cuts[1:], strict=False)]

    def _chains(self) -> Iterator[Sequence[tuple[int, ...]]]:
        everyone = sorted(range(len(self._speeds)), key=lambda machine: -self._speeds[machine])
        if len(everyone) <= _ALL:
            sizes = range(1, len(everyone) + 1)
            orders = (order for size in sizes for order in itertools.permutations(everyone, size))
            chains = [chain for order in orders for chain in _divided(order)]
            yield from self._source.sample(chains, len(chains))
            return
        yield from ([(machine,) for machine in everyone[:count]] for count in range(1, len(everyone) + 1))
        yield [tuple(everyone)]
        yield from ([tuple(everyone[:count])] for count in range(2, len(everyone)))
        while True:
            some = self._source.sample(everyone, self._source.randint(2, len(everyone)))
            order = self._source.choice((some, sorted(some, key=everyone.index)))
            yield self._source.choice(list(_divided(order)))

    def _shares(self, group: tuple[int, ...]) -> list[int]:
        by = self._source.choice((self._speeds, self._speeds, self._rooms, [1.0] * len(self._speeds)))
        most = max(by[machine] for machine in group)
        return [max(1, round(100 * by[machine] / most)) for machine in group]

    def _cuts(self, chain: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Yields layer borders of stages: first borders that fill the fastest stages' memory, then random borders."""
        if len(chain) == 1:
            yield [0, self._layers]
            return
        if self._layers < len(chain):
            return
        fastest = sorted(range(len(chain)), key=lambda at: -sum(self._speeds[machine] for machine in chain[at]))
        for fill in (0.98, 0.9):
            counts, left = [1] * len(chain), self._layers - len(chain)
            for at in fastest:
                room = sum(self._rooms[machine] for machine in chain[at])
                more = min(left, max(0, int(fill * room / self._layer_bytes) - 1))
                counts[at], left = counts[at] + more, left - more
            if not left:
                yield [0, *itertools.accumulate(counts)]
        inner = self._source.sample(range(1, self._layers), len(chain) - 1)
        yield [0, *sorted(inner), self._layers]

    @staticmethod
    def _entry(group: tuple[int, ...], shares: list[int], start: int, end: int) -> Entry:
        names = [f"m{machine + 1}" for machine in group]
        if len(names) == 1:
            return {"worker": names[0], "layers": [start, end]}
        return {"workers": names, "layers": [start, end], "shares": shares}


def _divided(order: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    for ends in itertools.product((False, True), repeat=len(order) - 1):
        places = [0, *(place for place, is_end in enumerate(ends, 1) if is_end), len(order)]
        yield [tuple(order[start:end]) for start, end in itertools.pairwise(places)]


@dataclass(frozen=True, slots=True, order=True)
class _Planned:
    answer_ms: float
    token_ms: float
    text: str
    kv_blocks: int


def _planned(cluster: AssumedCluster, model: AssumedModel, *overrides: str) -> _Planned | None:
    try:
        plan = AssumedCluster(cluster.assumed, overrides).plan(model)
    except InsufficientMemoryError:
        return None
    text = ", ".join(
        f"{'+'.join(members)} [{stage.start}, {stage.end}){' ' if stage.shares else ''}"
        f"{':'.join(map(str, stage.shares))}"
        for members, stage in zip(plan.chain, plan.leaders, strict=True)
    )
    prediction = prediction_of(plan)
    return _Planned(1e3 * prediction.answer_s, 1e3 * prediction.token_s, text, plan.kv_blocks)


def _outcome(case: _Case, most: int, source: random.Random) -> Measures | None:
    """Compares the planner's choice with plans that have at least as much KV memory. Returns None if no plan fits."""
    cluster, model = AssumedCluster(parse_machines(case.machines)), assumed_model(case.model)
    model.opened.costs  # noqa: B018  Computed here, so that it does not count as planning time.
    begun_s = process_time()
    chosen = _planned(cluster, model)
    planning_s = process_time() - begun_s
    if chosen is None:
        return None
    plans = itertools.islice(_Alternatives(cluster, model, source).plans(), most)
    tried = [
        _planned(cluster, model, "groups=off"),
        *(_planned(cluster, model, f"plan={json.dumps(plan)}") for plan in plans),
    ]
    found = [other for other in tried if other is not None and other.kv_blocks >= chosen.kv_blocks]
    best = min(found, default=chosen)
    figures = {"ratio": chosen.answer_ms / best.answer_ms, "answer ms": chosen.answer_ms, "token ms": chosen.token_ms}
    counts = {"others": len(found), "planning s": planning_s}
    return {**figures, **counts, "chosen": chosen.text, "best other": best.text if best is not chosen else ""}


@dataclass(frozen=True)
class PlanGrid(Case):
    """Compares the planner's choices with other plans on assumed clusters. No other plan may be clearly faster. The
    case compares predicted times for a prompt of 512 tokens and an answer of 128 tokens. The other plans are the best
    plan without groups, and manual plans with many divisions into stages, groups and shares. The case fails if another
    plan is faster by more than 3 %."""

    rounds = 1
    count: int | None = option(None, "number of clusters to draw from the grid (default: all)", positive)
    seed: int = option(1, "seed of the drawn clusters and plans")
    alternatives: int = option(60, "maximum number of manual plans per cluster", natural)

    async def groups(self) -> AsyncIterator[Group]:
        source, cases = random.Random(self.seed), _grid()
        if self.count is not None:
            cases = source.sample(cases, self.count)
        worst, fitting = 1.0, 0
        for case in cases:
            outcome = _outcome(case, self.alternatives, source)
            if outcome is not None:
                yield Group("", {f"{case.machines} {case.model}": partial(_same, outcome)})
                worst, fitting = max(worst, float(outcome["ratio"])), fitting + 1
        print(f"choices: {fitting} of {len(cases)} models fit; worst relative to the best other plan: {worst:.3f}")
        if worst > _WORSE:
            raise LlamaclustError(
                f"another plan is faster by more than {_WORSE - 1:.0%}; repeat with --seed {self.seed}"
            )


async def _same(outcome: Measures, turn: int) -> Measures:
    return outcome
