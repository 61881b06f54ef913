"""The interface between the engine and the stages, which are workers over gRPC or a stage in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.core.errors import WorkerError
from llamaclust.core.gpus import DeviceLayers
from llamaclust.core.limits import layer_place
from llamaclust.wire.microbatch.messages import Result


@dataclass(frozen=True, slots=True)
class StageInfo:
    """One stage of a running pipeline, with layers [start, end) on a worker. `devices` are the layers on the worker's
    GPUs. As in a plan, each member of a group has an entry of its own."""

    worker: str
    start: int
    end: int
    devices: tuple[DeviceLayers, ...] = ()
    expert_shards: int = 1  # start and end count parts of layers, so many for each
    shares: tuple[int, ...] = ()  # shares of the group's members; (): the worker holds the stage alone
    member: int = 0  # the member's index in the group; the first one leads
    encoder_bytes: int = 0  # memory of the encoder of images that the worker loads too; 0: it loads none

    @property
    def layers(self) -> tuple[float, float]:
        """The half-open range of layers. A bound inside a layer whose experts are divided is a fraction."""
        return layer_place(self.start, self.expert_shards), layer_place(self.end, self.expert_shards)


class KvDisks(Protocol):
    """The disks of a pipeline's stages, which store KV blocks by key. Results are the minimum over all stages. Methods
    raise LlamaclustError if a stage fails, and DeadlineError if a late stage may still use the blocks."""

    async def find(self, keys: Sequence[bytes]) -> int:
        """Returns how many leading keys all stages have on disk."""
        ...

    async def restore(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Reads blocks from disk. Returns how many leading blocks all stages have read."""
        ...

    async def save(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Writes `blocks`, which belong to the last of `keys`. Returns how many of them all stages now have on disk."""
        ...


@dataclass(frozen=True, slots=True)
class TileTask:
    """An image tile, uint8 [height, width, 3]. Its result is float32 [rows, width]."""

    tile: NDArray[np.uint8]
    rows: int
    width: int


class EncoderUnreachableError(WorkerError):
    """The image encoder cannot be reached now, and has not received the tile."""


class PipelineEncoder(Protocol):
    @property
    def worker(self) -> str | None:
        """The name of the encoder's worker. None if the encoder is in this process."""
        ...

    async def rows(self, task: TileTask) -> NDArray[np.float32]:
        """Returns a tile's rows. Raises RequestError if the encoder refuses the tile, EncoderUnreachableError if it has
        not received the tile, and another LlamaclustError if it fails."""
        ...


class Pipeline(Protocol):
    """A loaded model, divided into stages. It runs microbatches strictly in number order."""

    epoch: int
    stages: tuple[StageInfo, ...]

    @property
    def kv_disks(self) -> KvDisks | None: ...

    @property
    def encoder(self) -> PipelineEncoder | None: ...

    @property
    def no_images(self) -> str:
        """The reason why there is no encoder. It is empty if there is one, or if the model has no projector."""
        ...

    def submit(self, *scheduled: ScheduledMicrobatch) -> None:
        """Sends microbatches to the first stage, and their sampling inputs to the last stage, without waiting."""
        ...

    def prepare_matchers(self) -> None:
        """Tells the last stage that requests with matchers will come. Only the first call has an effect."""
        ...

    async def run(self, on_results: Callable[[Sequence[Result]], None]) -> None:
        """Passes results to `on_results` in number order. Raises LlamaclustError once the pipeline is lost."""
        ...

    async def close(self) -> None: ...


class NoPipeline:
    """Takes a pipeline's place while no model is loaded. It is never run."""

    epoch = 0
    stages: tuple[StageInfo, ...] = ()
    kv_disks: KvDisks | None = None
    encoder: PipelineEncoder | None = None
    no_images = ""

    def submit(self, *scheduled: ScheduledMicrobatch) -> None:
        raise AssertionError("no pipeline is loaded")

    def prepare_matchers(self) -> None:
        """Does nothing, because there is no stage."""

    async def run(self, on_results: Callable[[Sequence[Result]], None]) -> None:
        raise AssertionError("no pipeline is loaded")

    async def close(self) -> None: ...
