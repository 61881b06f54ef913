"""The seam between the engine and whatever runs microbatches: workers over gRPC, or a stage in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llamaclust.wire.messages import Microbatch, Result, SamplingInputs


@dataclass(frozen=True, slots=True)
class StageInfo:
    """One stage of a running pipeline: layers [start, end) on a worker."""

    worker: str
    start: int
    end: int


class Pipeline(Protocol):
    """A loaded model, cut into stages, that runs microbatches strictly in number order."""

    epoch: int
    stages: tuple[StageInfo, ...]

    async def submit(self, microbatch: Microbatch, inputs: SamplingInputs) -> None:
        """Hands a microbatch to the first stage and its sampling inputs to the last; returns when both are sent."""
        ...

    async def next_result(self) -> Result:
        """The next result, in number order. Waits without end for one; raises WorkerError once the pipeline is lost."""
        ...

    async def close(self) -> None: ...
