"""The executor seam: what a backend promises. A backend loads a program once and runs it on microbatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.limits import StageLimits
from llamaclust.model.gguf.tensors import Tensor
from llamaclust.model.program import KV_BLOCK_TOKENS, Program

if TYPE_CHECKING:
    from llamaclust.kernels._native import Gatherer, MicrobatchFrame

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

Progress = Callable[[int], None]
"""Called by the loading thread with the number of weight bytes loaded since the last call."""


@dataclass(frozen=True, slots=True)
class BatchStates:
    """State blocks of the sequences of a batch.

    The first row of sequence s reads the state in block before[s], unless its position is 0. For i in starts[s] ..
    starts[s + 1], the state behind row rows[i] is written to blocks[i]: of each sequence the one behind its last row,
    and of others those that sequences may go on from. A block that one sequence writes, no other one reads or writes.
    """

    before: Int32  # [sequences] block ids, -1 where no state is read
    starts: Int32  # [sequences + 1]
    rows: Int32  # [states] ascending row numbers
    blocks: Int32  # [states] block ids


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one microbatch, grouped by sequence.

    Rows sequence_starts[s] .. sequence_starts[s + 1] belong to sequence s, at ascending, consecutive positions.
    Position p of sequence s lives in KV block block_tables[table_starts[s] + p // KV_BLOCK_TOKENS]; in layers with a
    window, where those have blocks of their own, in window_tables[the same], -1 where the block is not there: no row
    sees it any more, or none stores it yet.
    """

    tokens: Int32  # [rows] token ids; read by a first stage only
    positions: Int32  # [rows]
    sequence_starts: Int32  # [sequences + 1]
    table_starts: Int32  # [sequences + 1]
    block_tables: Int32  # [sum of table lengths] KV block ids
    output_rows: Int32  # [outputs] ascending row numbers whose logits are wanted; read by a last stage only
    window_tables: Int32 | None = None  # [sum of table lengths] block ids, where limits.window_blocks > 0
    adapter_scales: Float32 | None = None  # [rows, adapters]; None: no row has one
    states: BatchStates | None = None  # where limits.state_blocks > 0

    @property
    def rows(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class RankedLogits:
    """Logits of a stage's last run, which stay on a GPU until they are asked for, and what most tokens are chosen
    by."""

    records: NDArray[np.int64]  # [outputs, words], see cpu/native/sampler/ranked.h
    rows: Callable[[Sequence[int]], Float32]
    """Logits of these rows, [rows, vocabulary]: a view that the next call overwrites."""
    totals: Callable[[Sequence[float]], NDArray[np.int64]]
    """Sums of weights by a divisor for each output, where it is not 0: [outputs, parts], likewise."""

    def __len__(self) -> int:
        return len(self.records)


Logits = Float32 | RankedLogits


class Stage(Protocol):
    """A loaded program with its weights, KV memory and buffers. One `run` at a time."""

    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def weights(self) -> object:
        """A reference that keeps the weights in memory, also after `close`."""

    def run(self, batch: Batch, hidden: Float32 | None) -> Float32:
        """Computes the batch. `hidden` [rows, embedding] for any but a first stage.

        Returns hidden [rows, embedding], or on a last stage logits [outputs, vocabulary]: a view that the next `run`
        overwrites.
        """

    def normed(self, rows: Int32) -> Float32:
        """A copy of the normed hidden state of these rows of the last `run`, [len(rows), embedding]; of a last
        stage."""

    def close(self) -> None:
        """Frees weights and KV memory; the stage must not run again."""


@runtime_checkable
class RanksLogits(Protocol):
    """A stage that can leave logits where they are."""

    @property
    def ranks_logits(self) -> bool:
        """Whether it has logits, and can."""

    def run_ranked(self, batch: Batch, hidden: Float32 | None) -> RankedLogits:
        """As `Stage.run`."""


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """Of a cache of experts, since the stage was loaded. A microbatch that uses an expert of a layer counts once,
    however many rows do."""

    hits: int = 0
    misses: int = 0
    copied_bytes: int = 0
    used_bytes: int = 0  # of experts that are there now

    def __add__(self, other: CacheCounts) -> CacheCounts:
        hits, misses = self.hits + other.hits, self.misses + other.misses
        return CacheCounts(hits, misses, self.copied_bytes + other.copied_bytes, self.used_bytes + other.used_bytes)


@runtime_checkable
class KvInRam(Protocol):
    """A stage whose KV memory lies in RAM, where no layer gives up blocks behind a window."""

    def kv_layers(self) -> tuple[tuple[NDArray[np.uint8], ...], ...]:
        """KV memory of each layer: of its keys and values and of each state, [KV blocks, bytes]. It stays in memory
        while it is referenced, also after `close`."""


@runtime_checkable
class RunsFrames(Protocol):
    """A stage that takes a microbatch as the native reader gives it, without arrays of Python's."""

    def run_frame(self, frame: MicrobatchFrame) -> Float32:
        """As `Stage.run`, of the frame's batch and hidden state."""


@runtime_checkable
class GathersRows(Protocol):
    """A stage whose program may be that of a group's member."""

    def gather_by(self, gatherer: Gatherer) -> None:
        """Sets what puts rows together in the next runs, which an error there ends."""


Experts = Callable[[int, Float32], Float32 | None]
"""Computes the exchange of that number, in the order of steps, for rows of what it reads [rows, widths together]. The
result [rows, width] is overwritten by the next call; None: it is in its place already."""


class ExchangingStage(Stage, Protocol):
    """A stage whose program may have exchanges."""

    @property
    def ranks_logits(self) -> bool: ...

    def run(self, batch: Batch, hidden: Float32 | None, experts: Experts | None = None) -> Float32: ...

    def run_ranked(self, batch: Batch, hidden: Float32 | None, experts: Experts | None = None) -> RankedLogits: ...


class ExpertsStage(Protocol):
    """Loaded experts. One `run_mixture` at a time."""

    weight_bytes: int
    workspace_bytes: int

    @property
    def weights(self) -> object:
        """See `Stage`."""

    def run_mixture(self, number: int, batch: Batch, hidden: Float32) -> Float32:
        """Computes the mixture of that number, in the order of steps, for rows of a batch. The result is overwritten by
        the next call."""

    def route(self, number: int, hidden: Float32) -> tuple[Int32, Float32]:
        """The experts of each row [rows, used] and their weights, by rank. This and all below: of experts that were
        loaded with `lines`."""

    def run_lines(self, number: int, x: Float32, experts: Int32) -> Float32:
        """What expert experts[i] of the mixture makes of x[i], not weighed. The result is overwritten by the next
        call."""

    def expert_weights(self, number: int, expert: int) -> tuple[NDArray[np.uint8], ...]:
        """The bytes of its matrices, as `Moe.inner` and `Moe.down` have them, then of its rows of biases, float32."""

    def close(self) -> None: ...


class ExpertsCache(Protocol):
    """Copies of often used experts on the device of a stage with exchanges."""

    n_bytes: int

    @property
    def counts(self) -> CacheCounts: ...

    def step(self) -> AbstractContextManager[None]:
        """Around a run of the stage: experts that it uses stay until it ends. DeviceLostError where a copy found the
        device lost."""

    def run_mixture(self, number: int, batch: Batch, hidden: Float32) -> Float32 | None:
        """See `Experts`."""

    def settle(self, timeout_s: float) -> bool:
        """Waits until the experts that are wanted are there; whether they are."""

    def close(self) -> None:
        """Waits for a run that is under way; later ones compute without the cache."""


class Backend(Protocol):
    """A device that can load programs."""

    name: str
    feature_level: str
    numerics_version: int  # equal ones give the same bits; 0: the reference

    def load(self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress) -> Stage: ...

    def held_bytes(self, program: Program, tensors: Mapping[str, Tensor]) -> int:
        """Bytes of the program's weights that are in memory already, for a stage loaded before: `load` takes no more
        for them."""

    def workspace_bytes(self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
        """What the loaded stage will take beside weights and KV memory. Errors as of `load`; reads no weights."""


@runtime_checkable
class SharesKv(Protocol):
    """A backend whose stages can use the KV memory of others."""

    def load_beside(
        self, stage: Stage, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress
    ) -> Stage:
        """As `load`, of the same layers with other adapters: the two stages have one KV memory and take turns. The
        other one may be in a run meanwhile."""


@runtime_checkable
class HasThreads(Protocol):
    """A backend that computes on threads of this process."""

    def apart(self) -> Backend:
        """The same with threads of its own and what is in memory of the same weights."""


class ExchangingBackend(Backend, Protocol):
    """A device whose programs may have exchanges."""

    def load(
        self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress
    ) -> ExchangingStage: ...

    def cache_experts(
        self,
        stage: ExchangingStage,
        experts: ExpertsStage,
        program: Program,
        tensors: Mapping[str, Tensor],
        limits: StageLimits,
        n_bytes: int,
    ) -> ExpertsCache | None:
        """A cache of `experts`, which were loaded of this program, in at most so many bytes beside a stage of this
        backend; None where that holds no expert."""


class ExpertsBackend(Backend, Protocol):
    """A device that computes experts for another one."""

    def load_experts(
        self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress, lines: int = 0
    ) -> ExpertsStage:
        """Of a program of `kernels.split_experts.experts_of`. `lines`: rows, once for each of their experts, that
        `route` and `run_lines` compute at most."""

    def experts_workspace_bytes(
        self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits, lines: int = 0
    ) -> int:
        """What those will take beside weights."""


def kv_bytes(program: Program, limits: StageLimits) -> int:
    """KV memory of CPUs and GPUs, without gaps between layers."""
    states = sum(kept.n_bytes for kept in program.states) * (limits.state_blocks or limits.kv_blocks)
    return states + sum(
        KV_BLOCK_TOKENS * kept.kv_token_bytes * limits.layer_blocks(kept.window) for kept in program.kv_layers
    )
