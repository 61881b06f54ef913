"""The interface of backends. A backend loads a program once, as a stage that runs microbatches."""

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
"""Receives the number of weight bytes that were loaded since the last call. The loading thread calls it."""


@dataclass(frozen=True, slots=True)
class BatchStates:
    """The state blocks of a batch's sequences. Sequence s starts from the state in block before[s], unless its first
    row is at position 0. For each i in starts[s] .. starts[s + 1], the state after row rows[i] is written to blocks[i].
    These states are checkpoints, from which other sequences may start, and at the end the state after the sequence's
    last row. If one sequence writes a block, no other sequence in the batch uses the block."""

    before: Int32  # [sequences] block ids, -1 where no state is read
    starts: Int32  # [sequences + 1]
    rows: Int32  # [states] ascending row numbers
    blocks: Int32  # [states] block ids


@dataclass(frozen=True, slots=True)
class GivenRows:
    """Rows that `ir.GivenRows` reads, such as an image's rows. They have one part for each level."""

    rows: Int32  # [given] ascending row numbers
    values: Float32  # [given, levels * width]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one microbatch, grouped by sequence.

    Rows sequence_starts[s] .. sequence_starts[s + 1] belong to sequence s, at ascending, consecutive positions.
    Position p of sequence s is in KV block block_tables[table_starts[s] + p // KV_BLOCK_TOKENS]. Layers with a window
    and their own KV blocks use window_tables at the same index. It is -1 if no row of the batch uses the block.

    Rows of a sequence that have equal `groups` are adjacent and all in this batch, at the group's positions [start,
    end). A row in no group is a group alone. Steps that merge rows need whole numbers of rows from each sequence."""

    tokens: Int32  # [rows] token ids; read by a first stage only
    positions: Int32  # [rows]
    sequence_starts: Int32  # [sequences + 1]
    table_starts: Int32  # [sequences + 1]
    block_tables: Int32  # [sum of table lengths] KV block ids
    output_rows: Int32  # [outputs] ascending row numbers whose logits are wanted; read by a last stage only
    window_tables: Int32 | None = None  # [sum of table lengths] block ids, where limits.window_blocks > 0
    adapter_scales: Float32 | None = None  # [rows, adapters]; None: no row has one
    states: BatchStates | None = None  # where limits.state_blocks > 0
    rope_positions: Int32 | None = None  # [sections, rows] below limits.max_context_tokens; None: `positions` in all
    groups: Int32 | None = None  # [rows, 2] positions [start, end) of each row's group; None: each row is one
    given: GivenRows | None = None  # None: no row

    @property
    def rows(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class RankedLogits:
    """The last run's logits, which stay on a GPU. A short record for each row is enough to sample most tokens."""

    records: NDArray[np.int64]  # [outputs, words], see cpu/native/sampler/ranked.h
    rows: Callable[[Sequence[int]], Float32]
    """Copies the logits of these rows to the host, [rows, vocabulary]. The next call overwrites the result."""
    totals: Callable[[Sequence[float]], NDArray[np.int64]]
    """Sums each output's sampling weights in parts, [outputs, parts]. The arguments are the outputs' divisors
    (temperatures). An output with divisor 0 is skipped. The result is a view that the next call overwrites."""

    def __len__(self) -> int:
        return len(self.records)


Logits = Float32 | RankedLogits


class Stage(Protocol):
    """A loaded program with its weights, KV memory and buffers. It runs one microbatch at a time."""

    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def weights(self) -> object:
        """A reference that keeps the weights in memory even after `close`."""

    def run(self, batch: Batch, hidden: Float32 | None) -> Float32:
        """Computes the batch. `hidden` [rows, embedding] is None for a first stage. Returns the hidden state [rows,
        embedding] or, from a last stage, logits [outputs, vocabulary]. The next `run` overwrites the result."""

    def normed(self, rows: Int32) -> Float32:
        """Copies the normed hidden state of these rows from a last stage's last `run`, [len(rows), embedding]."""

    def close(self) -> None:
        """Frees weights and KV memory. The stage must not run again."""


@runtime_checkable
class RanksLogits(Protocol):
    @property
    def ranks_logits(self) -> bool:
        """True for a last stage whose logits can stay on the device."""

    def run_ranked(self, batch: Batch, hidden: Float32 | None) -> RankedLogits:
        """Computes the batch like `Stage.run`, but leaves the logits on the device."""


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """The counts of an experts cache. In each microbatch an expert counts once, however many rows use it."""

    hits: int = 0
    misses: int = 0
    copied_bytes: int = 0
    used_bytes: int = 0  # of experts that are there now

    def __add__(self, other: CacheCounts) -> CacheCounts:
        hits, misses = self.hits + other.hits, self.misses + other.misses
        return CacheCounts(hits, misses, self.copied_bytes + other.copied_bytes, self.used_bytes + other.used_bytes)


@runtime_checkable
class KvInRam(Protocol):
    """A stage with its KV memory in RAM. Its layers never release the blocks that have left their windows."""

    def kv_layers(self) -> tuple[tuple[NDArray[np.uint8], ...], ...]:
        """Returns each layer's KV memory and states as arrays [KV blocks, bytes]. They stay valid after `close`."""


@runtime_checkable
class RunsFrames(Protocol):
    def run_frame(self, frame: MicrobatchFrame) -> Float32: ...


@runtime_checkable
class GathersRows(Protocol):
    def gather_by(self, gatherer: Gatherer) -> None:
        """Sets the gatherer for later runs. An error in the gatherer ends the run."""


Experts = Callable[[int, Float32], Float32 | None]
"""Computes exchange `number`, counted in the order of steps. The input has the buffers that the exchange reads, as
[rows, sum of widths]. Returns the result [rows, width], which the next call overwrites, or None if it is in place."""


class ExchangingStage(Stage, Protocol):
    @property
    def ranks_logits(self) -> bool: ...

    def run(self, batch: Batch, hidden: Float32 | None, experts: Experts | None = None) -> Float32: ...

    def run_ranked(self, batch: Batch, hidden: Float32 | None, experts: Experts | None = None) -> RankedLogits: ...


class ExpertsStage(Protocol):
    """Loaded experts, which compute one mixture at a time."""

    weight_bytes: int
    workspace_bytes: int

    @property
    def weights(self) -> object: ...

    def run_mixture(self, number: int, batch: Batch, hidden: Float32) -> Float32:
        """Computes mixture `number`, counted in the order of steps. The next call overwrites the result."""

    def route(self, number: int, hidden: Float32) -> tuple[Int32, Float32]:
        """Returns each row's experts, best first, and their weights: [rows, used]. Needs `lines` in `load_experts`."""

    def run_lines(self, number: int, x: Float32, experts: Int32) -> Float32:
        """Returns the unweighted output of expert experts[i] for row x[i]. The next call overwrites the result."""

    def expert_weights(self, number: int, expert: int) -> tuple[NDArray[np.uint8], ...]:
        """Returns one expert's packed matrices (in the order of `Moe.inner`, `Moe.down`), then its float32 biases."""

    def close(self) -> None: ...


class ExpertsCache(Protocol):
    n_bytes: int

    @property
    def counts(self) -> CacheCounts: ...

    def step(self) -> AbstractContextManager[None]:
        """Keeps a run's experts in the cache until the run ends. Raises DeviceLostError if a copy lost the device."""

    def run_mixture(self, number: int, batch: Batch, hidden: Float32) -> Float32 | None: ...

    def settle(self, timeout_s: float) -> bool:
        """Waits until all wanted experts are cached. Returns False if this takes longer than `timeout_s`."""

    def close(self) -> None:
        """Waits for a run in progress. Later runs compute without the cache."""


class Backend(Protocol):
    name: str
    feature_level: str
    numerics_version: int  # equal ones give the same bits; 0: the reference

    def load(self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress) -> Stage: ...

    def held_bytes(self, program: Program, tensors: Mapping[str, Tensor]) -> int:
        """Returns the size of weights that other stages have already loaded, for which `load` takes no more memory."""

    def workspace_bytes(self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
        """Returns a stage's memory except weights and KV memory. Raises the errors of `load`, but reads no weights."""


@runtime_checkable
class SharesKv(Protocol):
    def load_beside(
        self, stage: Stage, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress
    ) -> Stage:
        """Loads the same layers with other adapters, even during a run. Both stages share KV memory and take turns."""


@runtime_checkable
class HasThreads(Protocol):
    def apart(self, niceness: int = 0) -> Backend:
        """Returns a backend with its own threads, which shares the loaded weights. `niceness` lowers the threads'
        priority. The thread that calls `run` is not one of them and keeps its priority."""


class ExchangingBackend(Backend, Protocol):
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
        """Returns a cache for `experts` of at most `n_bytes` on the device of `stage`, or None if no expert fits."""


class ExpertsBackend(Backend, Protocol):
    def load_experts(
        self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress, lines: int = 0
    ) -> ExpertsStage:
        """Loads a program from `split_experts.experts_of`. `lines` is the line limit of `route` and `run_lines`."""

    def experts_workspace_bytes(
        self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits, lines: int = 0
    ) -> int:
        """Returns the memory that loaded experts take in addition to their weights, in bytes."""


def kv_bytes(program: Program, limits: StageLimits) -> int:
    """Returns the size of KV memory and states in bytes, without the padding that a GPU adds between layers."""
    states = sum(kept.n_bytes for kept in program.states) * (limits.state_blocks or limits.kv_blocks)
    return states + sum(
        KV_BLOCK_TOKENS * kept.kv_token_bytes * limits.layer_blocks(kept.window) for kept in program.kv_layers
    )
