"""Random planning problems, and all plans of small problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise, permutations

from hypothesis import strategies as st

from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.memory import PlanRequest, StagePlace
from llamaclust.cluster.planner.plan import Plan
from llamaclust.model.costs import LayerCost, ModelCosts
from support.plans.plan_inputs import profile, reach

GB = 10**9


CONTEXT = 1024


SIMPLER = 0.975  # a plan of another order or with groups must take less than this share of a simpler plan's time


Split = tuple[tuple[WorkerFacts, int, int], ...]


def workspace(place: StagePlace) -> int:
    return GB // 10 * (2 if place.is_last else 1) * place.threads


REQUEST = PlanRequest(context_length=CONTEXT, max_sequences=4, workspace=workspace)


WORKERS = st.builds(
    lambda memory, read, macs, reach: WorkerFacts("", int(memory * GB), profile(read, macs), 1, reach),
    st.sampled_from([1.3, 2.3, 4.0, 9.0, 30.0]),
    st.sampled_from([1.0, 3.0, 3.2, 10.0, 50.0]),
    st.sampled_from([50.0, 200.0, 1000.0]),
    st.builds(reach, st.sampled_from([0.0, 0.2, 30.0, 300.0]), st.sampled_from([0.0, 1.0, 80.0])),
)


MODELS = st.builds(
    lambda embedding, head, layers: ModelCosts(
        embedding * GB // 2, head * GB, head * 10**9, tuple(layers), hidden_bytes=16_384
    ),
    st.integers(0, 2),
    st.integers(0, 2),
    st.lists(
        st.builds(lambda tenths: LayerCost(tenths * GB // 10, tenths * 10**8, 100_000), st.sampled_from([8, 10, 10])),
        min_size=1,
        max_size=5,
    ),
)


def named(workers: Sequence[WorkerFacts]) -> list[WorkerFacts]:
    return [replace(worker, name=f"w{index}") for index, worker in enumerate(workers)]


@dataclass(frozen=True)
class Score:
    """The times of a plan for both objectives, in seconds."""

    latency: float
    throughput: float

    def of(self, objective: str) -> float:
        return self.latency if objective == "latency" else self.throughput


@dataclass(frozen=True)
class Every:
    """All plans of a cluster."""

    costs: ModelCosts
    workers: Sequence[WorkerFacts]

    @cached_property
    def _by_contexts(self) -> dict[int, list[Score]]:
        """Scores of all plans that fit, by the number of contexts in KV memory."""
        splits = [*self._splits()]
        return {count: [self.score(split) for split in splits if self._fits(split, count)] for count in (4, 1)}

    @cached_property
    def _stages(self) -> StageCosts:
        return StageCosts.of(self.costs)

    def scores(self) -> list[Score]:
        """Returns scores of all plans that fit with KV memory of 4 contexts, or of 1 context if there are none."""
        return self._by_contexts[4] or self._by_contexts[1]

    def scores_beside(self, plan: Plan) -> list[Score]:
        """Returns scores of all plans with the KV memory that `plan` has; a much faster plan may have less."""
        return self._by_contexts[4 if self._fits(self._split_of(plan), 4) else 1]

    def score(self, split: Split) -> Score:
        stages = self._stages
        linked = len(split) > 1  # each stage has a link in and one out
        mixes = (
            max(
                stages.prefill_s(*stage, 512) + stages.decode_s(*stage, 8) * 16,
                linked * 2 * stage[0].reach.byte_s * 512 * 16_384,
            )
            for stage in split
        )
        return Score(min(self._request_s(stages, split, chunks) for chunks in (1, 2, 4, 8, 16)), max(mixes))

    def _request_s(self, stages: StageCosts, split: Split, chunks: int) -> float:
        """Returns the time of a prompt of 512 tokens in consecutive chunks and of 128 generated tokens."""
        rows, layers, linked = 512 // chunks, len(self.costs.layers), len(split) > 1
        behind = (
            max(stages.prefill_s(*stage, rows), linked * 2 * stage[0].reach.byte_s * rows * 16_384) for stage in split
        )
        computed = sum(stages.prefill_s(*stage, rows) + 128 * stages.decode_s(*stage) for stage in split)
        sent = sum(
            worker.reach.byte_s * 16_384 * (128 + rows) * ((start > 0) + (end < layers)) for worker, start, end in split
        )
        hops = sum(2 * 128 * worker.reach.one_way_s for worker, _, _ in split)
        return computed + (chunks - 1) * max(behind) + linked * (sent + hops)

    def score_of(self, plan: Plan) -> Score:
        return self.score(self._split_of(plan))

    def _split_of(self, plan: Plan) -> Split:
        by_name = {worker.name: worker for worker in self.workers}
        return tuple((by_name[stage.worker], stage.start, stage.end) for stage in plan.stages)

    def _splits(self) -> Iterator[Split]:
        layers = len(self.costs.layers)
        for count in range(1, min(layers, len(self.workers)) + 1):
            for order in permutations(self.workers, count):
                for inner in combinations(range(1, layers), count - 1):
                    bounds = pairwise((0, *inner, layers))
                    yield tuple((worker, *bound) for worker, bound in zip(order, bounds, strict=True))

    def _fits(self, split: Split, contexts: int) -> bool:
        layers = self.costs.layers
        for worker, start, end in split:
            held = sum(
                layer.weight_bytes + contexts * CONTEXT * layer.kv_bytes_per_token for layer in layers[start:end]
            )
            ends = (start == 0) * self.costs.embedding_bytes + (end == len(layers)) * self.costs.head_bytes
            place = StagePlace(worker.threads, CONTEXT, end == len(layers))
            if held + ends + workspace(place) > (worker.memory_bytes or 0):
                return False
        return True


def large(layers: int) -> ModelCosts:
    return ModelCosts(GB // 2, GB, 10**9, (LayerCost(GB, 10**9, 1024),) * layers)
