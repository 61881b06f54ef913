"""The interface of backends. A backend loads a program once and returns a stage, which runs microbatches."""

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
"""A callback that receives the number of weight bytes loaded since its previous call, on a thread of the load."""


@dataclass(frozen=True, slots=True)
class BatchStates:
    """The blocks of recurrent states that a batch reads and writes. Sequence s starts from the state in block
    before[s], or from zeros if its first row is at position 0. For each i in [starts[s], starts[s + 1]), the state
    after row rows[i] is written to block blocks[i]. No other sequence may use a block that a sequence writes."""

    before: Int32  # [sequences] Block ids; -1 where no state is read.
    starts: Int32  # [sequences + 1]
    rows: Int32  # [states] Row numbers, ascending. A sequence's last number is its last row.
    blocks: Int32  # [states] Block ids.


@dataclass(frozen=True, slots=True)
class GivenRows:
    """Values that are computed outside the program for some rows, such as image embeddings. The `ir.GivenRows` step
    with `level` i reads values[:, i * width : (i + 1) * width]."""

    rows: Int32  # [given] Row numbers, ascending.
    values: Float32  # [given, levels * width]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one microbatch, grouped by sequence.

    Rows [sequence_starts[s], sequence_starts[s + 1]) belong to sequence s, at ascending, consecutive positions.
    Position p of sequence s is in KV block block_tables[table_starts[s] + p // KV_BLOCK_TOKENS]. Layers with a window
    may have KV blocks of their own, whose ids are at the same index of window_tables. An entry of a table is -1 if no
    row of the batch uses its block.

    A group is a range of positions whose rows attend to each other, such as an image. All rows of a group must be in
    one batch. If a step merges k rows into one, each sequence must have a multiple of k rows."""

    tokens: Int32  # [rows] Token ids. Only a first stage reads them.
    positions: Int32  # [rows]
    sequence_starts: Int32  # [sequences + 1]
    table_starts: Int32  # [sequences + 1]
    block_tables: Int32  # [sum of table lengths] KV block ids.
    # [outputs] Numbers of the rows whose logits are wanted, ascending. Only a last stage reads them.
    output_rows: Int32
    window_tables: Int32 | None = None  # [sum of table lengths] Block ids; None if limits.window_blocks is 0.
    adapter_scales: Float32 | None = None  # [rows, adapters]; None if no row uses an adapter.
    states: BatchStates | None = None  # None if limits.state_blocks is 0.
    # [sections, rows] Positions below limits.max_context_tokens; None if all sections use `positions`.
    rope_positions: Int32 | None = None
    # [rows, 2] Positions [start, end) of each row's group; None if each row is a group alone.
    groups: Int32 | None = None
    given: GivenRows | None = None  # None if no row is given.

    @property
    def rows(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class RankedLogits:
    """The last run's logits, which stay on the GPU, and the best candidates of each row."""

    records: NDArray[np.int64]  # [outputs, words]; cpu/native/sampler/ranked.h has the format.
    rows: Callable[[Sequence[int]], Float32]
    """Copies the logits of these rows to the host as [rows, vocabulary]. The next call overwrites the result."""
    totals: Callable[[Sequence[float]], NDArray[np.int64]]
    """Returns sums of exp((logit - largest logit) / divisor), in units of 2^-40: [outputs, parts of the vocabulary].
    The argument has each output's divisor, and 0 skips an output. The next call overwrites the result."""

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
        """Copies the output norm's results [len(rows), embedding] for `rows` of the last run. Only for a last stage."""

    def close(self) -> None:
        """Frees weights and KV memory. The stage must not run again."""


@runtime_checkable
class RanksLogits(Protocol):
    @property
    def ranks_logits(self) -> bool: ...

    def run_ranked(self, batch: Batch, hidden: Float32 | None) -> RankedLogits:
        """Computes the batch like `Stage.run`, but leaves the logits on the device."""


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """Counters of an experts cache. An expert counts once in each microbatch, however many rows use it."""

    hits: int = 0
    misses: int = 0
    copied_bytes: int = 0
    used_bytes: int = 0  # Size of the experts that are cached now.

    def __add__(self, other: CacheCounts) -> CacheCounts:
        hits, misses = self.hits + other.hits, self.misses + other.misses
        return CacheCounts(hits, misses, self.copied_bytes + other.copied_bytes, self.used_bytes + other.used_bytes)


@runtime_checkable
class KvInRam(Protocol):
    def kv_layers(self) -> tuple[tuple[NDArray[np.uint8], ...], ...]:
        """Returns each layer's KV memory and states as arrays [KV blocks, bytes], which stay valid after `close`."""


@runtime_checkable
class RunsFrames(Protocol):
    def run_frame(self, frame: MicrobatchFrame) -> Float32: ...


@runtime_checkable
class GathersRows(Protocol):
    def gather_by(self, gatherer: Gatherer) -> None:
        """Sets the gatherer, which exchanges rows among the members of a group. If an exchange fails, the run fails."""


Experts = Callable[[int, Float32], Float32 | None]
"""Computes the experts of a stage's `Exchange` step. The arguments are the step's index and its concatenated inputs.
Returns the result [rows, width], or None if it is already in the stage's memory. The next call overwrites it."""


class ExchangingStage(Stage, Protocol):
    @property
    def ranks_logits(self) -> bool: ...

    def run(self, batch: Batch, hidden: Float32 | None, experts: Experts | None = None) -> Float32: ...

    def run_ranked(self, batch: Batch, hidden: Float32 | None, experts: Experts | None = None) -> RankedLogits: ...


class ExpertsStage(Protocol):
    """Loaded mixtures of experts. In all methods, `number` is a mixture's index. A call overwrites earlier results."""

    weight_bytes: int
    workspace_bytes: int

    @property
    def weights(self) -> object: ...

    def run_mixture(self, number: int, batch: Batch, hidden: Float32) -> Float32: ...

    def route(self, number: int, hidden: Float32) -> tuple[Int32, Float32]:
        """Returns each row's expert ids [rows, used], best first, and their weights. Needs a load with `lines` > 0."""

    def run_lines(self, number: int, x: Float32, experts: Int32) -> Float32:
        """Returns the unweighted output of expert experts[i] for row x[i]. The next call overwrites the output."""

    def expert_weights(self, number: int, expert: int) -> tuple[NDArray[np.uint8], ...]:
        """Returns one expert's packed matrices (`Moe.inner`, then `Moe.down`), followed by its float32 biases."""

    def close(self) -> None: ...


class ExpertsCache(Protocol):
    n_bytes: int

    @property
    def counts(self) -> CacheCounts: ...

    def step(self) -> AbstractContextManager[None]:
        """Wraps a run of the stage. Until the run ends, its experts stay cached. Raises DeviceLostError."""

    def run_mixture(self, number: int, batch: Batch, hidden: Float32) -> Float32 | None: ...

    def settle(self, timeout_s: float) -> bool:
        """Waits until no copy to the cache is pending. Returns False if `timeout_s` seconds pass first."""

    def close(self) -> None:
        """Waits for a run in progress and frees the cache. Later runs compute without the cache."""


class Backend(Protocol):
    name: str
    feature_level: str
    numerics_version: int  # Backends with equal versions give the same bits. The reference backend has version 0.

    def load(self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress) -> Stage: ...

    def held_bytes(self, program: Program, tensors: Mapping[str, Tensor]) -> int:
        """Returns the size of the weights that other stages have already loaded, and that `load` would share."""

    def workspace_bytes(self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits) -> int:
        """Returns a stage's memory besides weights and KV memory. Reads no weights. Raises the errors of `load`."""


@runtime_checkable
class SharesKv(Protocol):
    def load_beside(
        self, stage: Stage, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress
    ) -> Stage:
        """Loads the layers of `stage` again, with other adapters. `stage` may run during the load. Both stages then use
        the KV memory of `stage`, so they must not run at the same time."""


@runtime_checkable
class HasThreads(Protocol):
    def apart(self, niceness: int = 0) -> Backend:
        """Returns a backend with the same weights and its own threads. `niceness` lowers the threads' priority."""


def with_own_threads(backend: Backend, niceness: int = 0) -> Backend:
    """Returns a copy of `backend` with its own threads (see `apart`), or `backend` itself if it has no threads."""
    return backend.apart(niceness) if isinstance(backend, HasThreads) else backend


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
        """Returns a cache of at most `n_bytes` for `experts`, on the device of `stage`, or None if no expert fits."""


class ExpertsBackend(Backend, Protocol):
    def load_experts(
        self, program: Program, tensors: dict[str, Tensor], limits: StageLimits, progress: Progress, lines: int = 0
    ) -> ExpertsStage:
        """Loads a program that `experts_of` made. `lines` is the maximum number of rows of one `run_lines` call."""

    def experts_workspace_bytes(
        self, program: Program, tensors: Mapping[str, Tensor], limits: StageLimits, lines: int = 0
    ) -> int: ...


def kv_bytes(program: Program, limits: StageLimits) -> int:
    """Returns the bytes of KV memory and states. A GPU adds padding between layers, which is not included."""
    states = sum(kept.n_bytes for kept in program.states) * (limits.state_blocks or limits.kv_blocks)
    return states + sum(
        KV_BLOCK_TOKENS * kept.kv_token_bytes * limits.layer_blocks(kept.window) for kept in program.kv_layers
    )
