"""Builds a chain of stages from a plan's assignments, with each device's layers, KV blocks and a predicted speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from llamaclust.cluster.planner.context import ContextBounds, ContextChoice
from llamaclust.cluster.planner.costs import StageCosts, WorkerFacts
from llamaclust.cluster.planner.devices import PlannedLayers, devices_of
from llamaclust.cluster.planner.manual import Assignment
from llamaclust.cluster.planner.memory import MemoryModel
from llamaclust.cluster.planner.plan import Prediction, usual_prompt_tokens
from llamaclust.cluster.planner.predict import predict
from llamaclust.cluster.planner.stage_parts import HeldStage, StageParts, held_by_group
from llamaclust.model.groups.portion import Portion


@dataclass(frozen=True, slots=True)
class Chain:
    sizes: MemoryModel
    stages: tuple[HeldStage, ...]

    @classmethod
    def of(
        cls, sizes: MemoryModel, entries: Sequence[Assignment], workers: Mapping[str, WorkerFacts], contexts: int
    ) -> Self:
        """Builds the stages of a plan. The layers of each worker are divided among its devices so that `contexts`
        full-length sequences fit into KV memory."""
        return cls(sizes, tuple(_held_stage(sizes, entry, workers, contexts) for entry in entries))

    @property
    def members(self) -> list[StageParts]:
        return [member for stage in self.stages for member in stage.members]

    @property
    def kv_blocks(self) -> int:
        return min(self.sizes.of(member.costs, member.portion).kv_blocks(member.parts) for member in self.members)

    @property
    def prediction(self) -> Prediction | None:
        if not is_measured([part.device for member in self.members for part in member.parts]):
            return None
        request = self.sizes.request
        return predict(
            self.stages,
            usual_prompt_tokens(request.context_length),
            request.max_sequences,
            request.links,
            max_drafted=self.sizes.max_drafted,
            may_chain=self.sizes.kv_groups.window is None,
        )


def _held_stage(sizes: MemoryModel, entry: Assignment, workers: Mapping[str, WorkerFacts], contexts: int) -> HeldStage:
    if entry.shares:
        assert sizes.request.group_costs is not None, (
            "a plan with shares must be refused if the model has no group costs"
        )

        def held_of(name: str, costs: StageCosts, portion: Portion) -> tuple[PlannedLayers, ...]:
            return sizes.of(costs, portion).held(workers[name], entry.start, entry.end, contexts)

        return held_by_group(entry, held_of, sizes.request.group_costs, sizes.request.links)
    (name,) = entry.workers
    return HeldStage((StageParts(name, sizes.held(workers[name], entry.start, entry.end, contexts), sizes.stages),))


def is_measured(workers: Sequence[WorkerFacts]) -> bool:
    devices = (device for worker in workers for device in devices_of(worker))
    return all(device.profile is not None for device in devices)


def with_context(chain: Chain) -> tuple[Chain, ContextChoice]:
    """Returns the stages with KV memory for the context that was chosen, and the choice. Layers do not move, so a
    model that runs with the shortest context runs as fast with a longer one."""
    request = chain.sizes.request
    bounds = request.context_bounds or ContextBounds.fixed(request.context_length)
    kept = request.kept_context
    tokens = bounds.longest(lambda length: not _missing_bytes(chain, length)) if kept is None else kept
    missing_bytes = _missing_bytes(chain, bounds.most) if tokens < bounds.most else 0
    return _lengthened(chain, tokens), ContextChoice(tokens, bounds, missing_bytes)


def _lengthened(chain: Chain, tokens: int) -> Chain:
    request = chain.sizes.request
    if tokens == request.context_length:
        return chain
    # A longer context must not mean that fewer sequences run together.
    window_blocks = chain.sizes.kv_groups.window_blocks(chain.kv_blocks)
    longer = replace(request, context_length=tokens, least_window_blocks=window_blocks)
    return replace(chain, sizes=replace(chain.sizes, request=longer))


def _missing_bytes(chain: Chain, tokens: int) -> int:
    sizes = _lengthened(chain, tokens).sizes
    return sum(sizes.of(each.costs, each.portion).context_shortfall(each.parts) for each in chain.members)
