"""Data messages: microbatches between stages, sampling inputs to the last stage, and results to the coordinator."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampler.matchers import MatcherStart
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import RowTask


@dataclass(frozen=True, slots=True)
class ImageRows:
    """The rows of a chunk that belong to images. `given` and `groups` are ascending row ranges [first, end)."""

    given: tuple[tuple[int, int], ...] = ()  # Rows whose embeddings are in `values`.
    values: bytes = b""  # float32, little endian [given rows, levels * embedding].
    groups: tuple[tuple[int, int], ...] = ()  # Rows that attend to each other in both directions.
    # int32, little endian [rows of the chunk, sections], or empty if they equal the rows' positions.
    rope_positions: bytes = b""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to compute now: one token in decode, more in prefill."""

    tokens: tuple[int, ...]
    position: int  # Position of the first token.
    # All KV blocks of the sequence, of 16 tokens each, as runs of consecutive ids: (start, count, start, count, ...).
    table: tuple[int, ...]
    outputs: int  # Number of last rows that are sampled or scored.
    # (number of an earlier microbatch, index among its output rows). The stage replaces the only token, which is 0, by
    # the token that this row chose.
    depends_on: tuple[int, int] | None = None
    # Blocks of sliding-window layers with their own blocks, from the block number `window_start` of the sequence on.
    window_table: tuple[int, ...] = ()
    window_start: int = 0
    embedded: tuple[int, int] = (0, 0)  # Rows [first, end) whose normed hidden states are in the result.
    adapters: AdapterScales = ()
    state_from: int | None = None  # State block that the first row reads, if states have their own blocks.
    # (rows, block, rows, block, ...). Each block receives the state after this number of rows.
    state_to: tuple[int, ...] = ()
    next_token: int | None = None  # The token after the chunk, for an MTP head.
    drafts: int = 0  # Number of tokens that an MTP head drafts.
    checked: bool = False  # True if the first stage whose hidden state is not finite fails the microbatch.
    images: ImageRows | None = None

    @property
    def embedded_rows(self) -> int:
        return self.embedded[1] - self.embedded[0]

    @property
    def image_bytes(self) -> int:
        return 0 if self.images is None else len(self.images.values)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A unit of work. Every stage runs an epoch's microbatches in order of `number`: 0, 1, 2 and so on."""

    model_id: str
    epoch: int
    number: int
    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def embedded_rows(self) -> int:
        return sum(chunk.embedded_rows for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """Tasks for the last stage, one per output row of a microbatch. First, the stage drops or starts matchers."""

    epoch: int
    number: int
    tasks: tuple[RowTask, ...]
    released: tuple[int, ...] = ()  # Keys of answers that have ended or wait. Their matchers are dropped.
    # Matchers for answers whose rows are in this microbatch or in later microbatches.
    starts: tuple[MatcherStart, ...] = ()


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Tokens of a microbatch's output rows. The last stage sends them to the first stage for chunks that need them."""

    number: int
    tokens: tuple[int, ...]  # Contains 0 for a row without an answer. Empty if the microbatch failed.


@dataclass(frozen=True, slots=True)
class StageTiming:
    """One stage's times for one microbatch, in nanoseconds on the worker's monotonic clock."""

    queue_ns: int  # Time from the arrival of the microbatch and of the sampled tokens that it needs to its start.
    compute_ns: int
    wire_ns: int  # Time to serialize the previous frame and to hand it to the network.
    rows: int


@dataclass(frozen=True, slots=True)
class Result:
    epoch: int
    number: int
    rows: tuple[RowResult, ...] = ()
    timings: tuple[StageTiming, ...] = field(default=())  # The first stage comes first.
    failure: str | None = None  # One line that names the worker, its layers and the fault.
    embeddings: bytes = b""  # Normed hidden states of the embedded rows in row order. float32, little endian.
    drafting_ns: int = 0  # Time in which the last stage's MTP head drafted. Not included in `compute_ns`.
