"""What travels, as dataclasses: microbatches between stages, sampling inputs to the last stage, results back.

The codec checks every bound named here; nobody else sees protobuf.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.wire.sampler_chain import SamplerChain

PROTOCOL_VERSION = (3, 0)
"""(major, minor): another major is refused at the handshake; unknown fields of a newer minor are ignored."""

NUMERICS_VERSION = 4
"""Version of the arithmetic rules of docs/numerics.md: workers that compute by others are refused at the handshake."""

MAX_SEQUENCES = 1024
MAX_TOKENS = 8192
MAX_CONTEXT_TOKENS = 1 << 20
MAX_TOP_LOGPROBS = 128
MAX_VOCABULARY = 1 << 20
MAX_KV_BLOCKS = 1 << 26


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive tokens of one sequence to compute now: one in decode, more in prefill.

    tokens[i] stands at `position` + i and is stored there in KV memory, which `table` maps in order: position p lives
    in the table's block p // 16. The table is written as runs of consecutive ids, (start, count, start, count, ...).
    The last `outputs` rows are sampled or scored. Where it `follows` a row, its only token is the one chosen there,
    which nobody knew when it was sent; then tokens is (0,). Where layers with a window have KV blocks of their own,
    `window_table` has those from the table's block number `window_start` to the last token's, in the same manner.
    """

    tokens: tuple[int, ...]
    position: int
    table: tuple[int, ...]
    outputs: int
    follows: tuple[int, int] | None = None  # (number of an earlier microbatch, index among its output rows)
    window_table: tuple[int, ...] = ()
    window_start: int = 0


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
    def outputs(self) -> int:
        return sum(chunk.outputs for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is chosen. Defaults choose greedily. Order of work: docs/numerics.md."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # llama.cpp's repeat_penalty: logits of seen tokens divided / multiplied by it
    frequency_penalty: float = 0.0  # subtracted once per earlier occurrence
    presence_penalty: float = 0.0  # subtracted once if the token occurred
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit), ids ascending
    chain: SamplerChain | None = None  # more samplers, or another order

    @property
    def needs_history(self) -> bool:
        """Whether there are penalties, which count the tokens so far."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def needs_state(self) -> bool:
        """Whether a choice depends on more than tokens: Mirostat's mu, which comes with the token before."""
        return self.chain is not None and self.chain.mirostat != 0


@dataclass(frozen=True, slots=True)
class SampleTask:
    """Choose the token after an output row. The draw is keyed by (seed, choice) and counted by `position`."""

    params: SamplingParams
    seed: int  # 64 bits, unsigned
    choice: int  # index among a request's n choices
    position: int  # absolute position of the token to be chosen
    history: tuple[int, ...] = ()  # tokens that penalties and DRY look at, oldest first; empty where there are none
    suppressed: tuple[int, ...] = ()  # ids that may not be chosen (min_tokens)
    top_logprobs: int = 0
    history_follows: bool = False  # the token that its chunk follows is the newest of the history, too
    penalty_window: int | None = None  # newest tokens of the history that penalties count; None: all
    dry_window: int | None = None  # and that DRY looks at
    breakers: tuple[tuple[int, ...], ...] = ()  # token sequences that DRY does not look beyond
    mu: float = 0.0  # of Mirostat, from the token before


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """The logprob of a given token after an output row (perplexity, echo)."""

    token: int
    top_logprobs: int = 0


RowTask = SampleTask | ScoreTask


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """What the last stage does with the output rows of microbatch (epoch, number), one task a row, in row order."""

    epoch: int
    number: int
    tasks: tuple[RowTask, ...]


@dataclass(frozen=True, slots=True)
class RowResult:
    """A chosen or scored token; logprobs are float32 values of the raw logits' log-softmax."""

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token, logprob), best first
    failure: str | None = None  # why this row has no answer (logits not finite); then token is -1, logprob NaN
    mu: float | None = None  # of Mirostat, for the next token


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the last stage tells the first: the tokens of a microbatch's output rows, for chunks that follow them."""

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
