"""Defines the interface between the engine and the stages, which run on workers or in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.core.errors import WorkerError
from llamaclust.core.gpus import DeviceLayers
from llamaclust.core.limits import shard_position
from llamaclust.wire.microbatch.messages import Result


@dataclass(frozen=True, slots=True)
class StageInfo:
    """One stage of a running pipeline: layers [start, end) on a worker. `devices` has the layers on the worker's GPUs.
    Each member of a group of workers has its own StageInfo."""

    worker: str
    start: int
    end: int
    devices: tuple[DeviceLayers, ...] = ()
    expert_shards: int = 1  # Number of parts that each layer is divided into. `start` and `end` count such parts.
    shares: tuple[int, ...] = ()  # Shares of the group's members. Empty if one worker holds the stage alone.
    member: int = 0  # Index of the member in its group. Member 0 is the leader.
    encoder_bytes: int = 0  # Bytes of memory of the image encoder that the worker also loads. 0 if it loads none.

    @property
    def layers(self) -> tuple[float, float]:
        """The half-open range of layers. A fraction, such as 4.5, means that the experts of a layer are divided."""
        return shard_position(self.start, self.expert_shards), shard_position(self.end, self.expert_shards)


class KvDisks(Protocol):
    """Stores KV blocks on the disks of all stages. Methods raise LlamaclustError if a stage fails, and DeadlineError if
    a slow stage may still use the blocks."""

    async def find(self, keys: Sequence[bytes]) -> int:
        """Returns the number of leading keys whose blocks are on the disks of all stages."""
        ...

    async def restore(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Reads blocks from disk. Returns the number of leading blocks that all stages have read."""
        ...

    async def save(self, keys: Sequence[bytes], blocks: Sequence[int]) -> int:
        """Writes `blocks`, whose keys are the last len(blocks) items of `keys`. Returns the number of these blocks that
        are on the disks of all stages."""
        ...


@dataclass(frozen=True, slots=True)
class TileTask:
    """An image tile, uint8 [height, width, 3]. Its encoding is float32 [rows, width], one row per image token."""

    tile: NDArray[np.uint8]
    rows: int
    width: int


class EncoderUnreachableError(WorkerError):
    """The image encoder cannot be reached, and has not received the image tile."""


class PipelineEncoder(Protocol):
    @property
    def worker(self) -> str | None:
        """Name of the worker that runs the encoder. None if the encoder runs in this process."""
        ...

    async def rows(self, task: TileTask) -> NDArray[np.float32]:
        """Encodes a tile. Raises RequestError if the encoder refuses the tile, EncoderUnreachableError if the encoder
        has not received it, and another LlamaclustError if encoding fails."""
        ...


class Pipeline(Protocol):
    """A loaded model, divided into stages. It computes microbatches strictly in the order of their numbers."""

    epoch: int
    stages: tuple[StageInfo, ...]

    @property
    def workers(self) -> frozenset[str]:
        """Names of the workers that the pipeline needs, with all members of groups. Empty if there are no workers."""
        ...

    @property
    def kv_disks(self) -> KvDisks | None: ...

    @property
    def encoder(self) -> PipelineEncoder | None: ...

    @property
    def no_images(self) -> str:
        """The reason why images cannot be encoded. Empty if they can be, or if the model has no projector."""
        ...

    def submit(self, *scheduled: ScheduledMicrobatch) -> None:
        """Sends microbatches to the first stage, and their sampling parameters to the last stage. Does not wait."""
        ...

    def prepare_matchers(self) -> None:
        """Tells the last stage to expect requests with grammars. Further calls have no effect."""
        ...

    async def run(self, on_results: Callable[[Sequence[Result]], None]) -> None:
        """Passes results to `on_results` in number order. Raises LlamaclustError if the pipeline is lost."""
        ...

    async def close(self) -> None: ...


class NoPipeline:
    """Takes the place of a pipeline while no model is loaded."""

    epoch = 0
    stages: tuple[StageInfo, ...] = ()
    workers = frozenset[str]()
    kv_disks: KvDisks | None = None
    encoder: PipelineEncoder | None = None
    no_images = ""

    def submit(self, *scheduled: ScheduledMicrobatch) -> None:
        raise AssertionError("no pipeline is loaded")

    def prepare_matchers(self) -> None: ...

    async def run(self, on_results: Callable[[Sequence[Result]], None]) -> None:
        raise AssertionError("no pipeline is loaded")

    async def close(self) -> None: ...
