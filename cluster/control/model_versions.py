"""Replaces the model of a control loop by the same one with other adapters, while it serves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from llamaclust.cluster.control import observations as seen
from llamaclust.cluster.control.actions import ActionRunner
from llamaclust.cluster.control.cluster_state import ClusterState
from llamaclust.core.errors import DeadlineError, LlamaclustError, WorkerError
from llamaclust.model.loader import Model

_DEADLINE_S = 600.0
"""Until a version serves: an epoch of before may retire, and weights load, meanwhile."""


@dataclass(eq=False, slots=True)
class _Outcome:
    """Of a change to a version."""

    model_id: str
    is_served: bool = False
    error: LlamaclustError | None = None

    def is_decided(self, state: ClusterState) -> bool:
        """By this state or an earlier one."""
        if state.pool.model_id == self.model_id and self.error is None and not self.is_served:
            self.is_served = state.has_version
            unloaded = None if state.is_wanted else WorkerError("the model was unloaded meanwhile")
            self.error = None if self.is_served else state.version_error or unloaded
        return self.is_served or self.error is not None


@dataclass(eq=False, slots=True)
class ModelVersions:
    """Of one model. A version is known by its model id."""

    _runner: ActionRunner
    deadline_s: float = _DEADLINE_S
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def model_id(self) -> str:
        """Of the version that is wanted."""
        return self._runner.observed.state.pool.model_id

    @property
    def served_id(self) -> str:
        """Of the version that serves; if none does, of the one that is wanted."""
        epoch = self._runner.epoch
        is_lost = self._runner.observed.state.loss is not None
        return self.model_id if epoch is None or is_lost else epoch.settings.model_id

    @property
    def wanted(self) -> Model:
        """That version."""
        return self._runner.epochs.version(self.model_id)

    @property
    def is_asleep(self) -> bool:
        return not self._runner.observed.state.is_wanted

    async def replace(self, model: Model) -> None:
        """Returns when a version serves: its epoch is loaded beside the serving one, as a better plan's is. Raises why
        that is not possible; then the version of before serves on."""
        async with self._turn:
            before, observed = self.model_id, self._runner.observed
            if model.model_id == before:
                return
            self._runner.epochs.add_version(model)
            observed.post(seen.VersionWanted(model.model_id))
            outcome = _Outcome(model.model_id)
            try:
                await self._decided(outcome)
            finally:
                if not outcome.is_served:
                    observed.post(seen.VersionWanted(before))
            if outcome.error is not None:
                await observed.until(lambda state: state.pool.model_id == before)
                raise outcome.error

    async def _decided(self, outcome: _Outcome) -> None:
        try:
            async with asyncio.timeout(self.deadline_s):
                await self._runner.observed.until(outcome.is_decided)
        except TimeoutError:
            what = f"the model does not serve with its new adapters within {self.deadline_s:g} s"
            outcome.error = DeadlineError(f"{what}: try again when fewer requests run")
