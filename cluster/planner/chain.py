"""Builds a chain of stages from a plan's assignments, with each device's layers, KV blocks and a predicted speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

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
