"""Data messages: microbatches between stages, sampling inputs to the last stage, and results to the coordinator."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampling import MatcherStart, RowResult, RowTask


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Data for a chunk's image rows. Ranges [first, end) of the chunk's rows are in ascending order."""

    given: tuple[tuple[int, int], ...] = ()  # rows whose embedding is given
    values: bytes = b""  # these embeddings: float32, little endian [given rows, levels * embedding]
    groups: tuple[tuple[int, int], ...] = ()  # rows that see each other both ways
    rope_positions: bytes = b""  # int32, little endian [rows of the chunk, sections]; empty: the rows' positions


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to compute now: one token in decode, more in prefill.

    tokens[i] is at `position` + i. `table` lists the sequence's KV blocks, which hold 16 tokens each, from the first
    token on. It stores runs of consecutive ids as (start, count, start, count, ...). `window_table` lists the blocks of
    layers with a sliding window, from block number `window_start` on, if these layers have their own blocks. The last
    `outputs` rows are sampled or scored. If `depends_on` is set, `tokens` is (0,). The only token is then the one
    sampled at that row, which is unknown when the chunk is sent. The result has the normed hidden state of the
    `embedded` rows [first, end). An MTP head reads `next_token`, the token after the chunk's last token, if known. It
    drafts `drafts` tokens after the last chosen token. If `checked`, the first stage whose hidden state for the chunk
    is not finite fails the microbatch."""

    tokens: tuple[int, ...]
    position: int
    table: tuple[int, ...]
    outputs: int
    depends_on: tuple[int, int] | None = None  # (number of an earlier microbatch, index among its output rows)
    window_table: tuple[int, ...] = ()
    window_start: int = 0
    embedded: tuple[int, int] = (0, 0)
    adapters: AdapterScales = ()
    state_from: int | None = None  # the block of the state that the first row reads, where states have their own
    state_to: tuple[int, ...] = ()  # (rows, block, rows, block, ...): blocks that get the state behind so many rows
    next_token: int | None = None
    drafts: int = 0
    checked: bool = False
    images: ImageRows | None = None

    @property
    def embedded_rows(self) -> int:
        return self.embedded[1] - self.embedded[0]

    @property
    def image_bytes(self) -> int:
        return 0 if self.images is None else len(self.images.values)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A unit of work. Every stage runs an epoch's microbatches in the order of `number`, from 0 on without gaps."""

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
    """The last stage's tasks for a microbatch, one for each output row. The stage first drops `released` matchers."""

    epoch: int
    number: int
    tasks: tuple[RowTask, ...]
    released: tuple[int, ...] = ()  # keys of answers that have ended, or wait
    starts: tuple[MatcherStart, ...] = ()  # of answers whose rows are in this microbatch or in later ones


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The tokens of a microbatch's output rows. The last stage sends them to the first stage for dependent chunks."""

    number: int
    tokens: tuple[int, ...]  # 0 for a row without an answer; none where the microbatch failed


@dataclass(frozen=True, slots=True)
class StageTiming:
    """One stage's times for one microbatch, in nanoseconds on the worker's monotonic clock."""

    queue_ns: int  # received, with the tokens it follows, until started
    compute_ns: int
    wire_ns: int  # serializing and handing the previous frame to the network
    rows: int


@dataclass(frozen=True, slots=True)
class Result:
    epoch: int
    number: int
    rows: tuple[RowResult, ...] = ()
    timings: tuple[StageTiming, ...] = field(default=())  # first stage first
    failure: str | None = None  # one line: worker, layers, what happened
    embeddings: bytes = b""  # normed hidden state of the embedded rows, in row order: float32, little endian
    drafting_ns: int = 0  # of the last stage, for tokens that its head drafted, beside its compute_ns
