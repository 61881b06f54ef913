"""Data messages: microbatches between stages, sampling inputs to the last stage, results back."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.core.limits import AdapterScales
from llamaclust.core.sampling import MatcherStart, RowResult, RowTask


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive tokens of one sequence to compute now: one in decode, more in prefill.

    tokens[i] stands at `position` + i and is stored there in KV memory, which `table` maps in order: position p lives
    in the table's block p // 16. The table is written as runs of consecutive ids, (start, count, start, count, ...).
    The last `outputs` rows are sampled or scored. If it `depends_on` a row, its only token is the one sampled there,
    unknown when it was sent; then tokens is (0,). Where layers with a window have KV blocks of their own,
    `window_table` has those from the table's block number `window_start` to the last token's, in the same manner.
    The result has the normed hidden state of the `embedded` rows [first, end) of the chunk. Its rows are computed with
    these adapters of LoRA. An MTP head reads `next_token`, the one behind the last where it is known, and drafts so
    many tokens behind the one that the last row that counts chooses. `checked`: the microbatch fails at the first stage
    where the chunk's hidden state is not finite, which it was not before.
    """

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

    @property
    def embedded_rows(self) -> int:
        return self.embedded[1] - self.embedded[0]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One unit of work, which every stage runs in the order of `number` (from 0, without gaps, within an epoch)."""

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
    """What the last stage does with the output rows of microbatch (epoch, number), one task a row, in row order.

    Before that it forgets the matchers of answers that `released` names. Of `starts` it makes matchers meanwhile.
    """

    epoch: int
    number: int
    tasks: tuple[RowTask, ...]
    released: tuple[int, ...] = ()  # keys of answers that have ended, or wait
    starts: tuple[MatcherStart, ...] = ()  # of answers whose rows are in this microbatch or in later ones


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Sent by the last stage to the first: tokens of a microbatch's output rows, for chunks that depend on them."""

    number: int
    tokens: tuple[int, ...]  # 0 for a row without an answer; none where the microbatch failed


@dataclass(frozen=True, slots=True)
class StageTiming:
    """What one stage did for one microbatch, in nanoseconds of that worker's monotonic clock."""

    queue_ns: int  # received, with the tokens it follows, until started
    compute_ns: int
    wire_ns: int  # serializing and handing the previous frame to the network
    rows: int


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one microbatch: a row result for each task, or the failure that stopped it."""

    epoch: int
    number: int
    rows: tuple[RowResult, ...] = ()
    timings: tuple[StageTiming, ...] = field(default=())  # first stage first
    failure: str | None = None  # one line: worker, layers, what happened
    embeddings: bytes = b""  # normed hidden state of the embedded rows, in row order: float32, little endian
    drafting_ns: int = 0  # of the last stage, for tokens that its head drafted, beside its compute_ns
