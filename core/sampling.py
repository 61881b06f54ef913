"""Parameters of sampling and scoring, the grammar of an answer, and the result for one row of logits."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias, overload

from llamaclust.core.bounds import LOCAL, Integer, Size, Text
from llamaclust.core.sampler_chain import CHAIN, SamplerChain
from llamaclust.core.sampling_bounds import (
    MAX_CONTEXT_TOKENS,
    MAX_GRAMMAR_BYTES,
    MAX_PENALTY,
    MAX_REASONING_END_TOKENS,
    MAX_TOP_K,
    MAX_TRIGGER_BYTES,
    MAX_TRIGGERS,
    MAX_VOCABULARY,
    SamplingField,
    number,
    rows_of,
)

if TYPE_CHECKING:  # The import is slow, and clients do not need it.
    import numpy as np
    from numpy.typing import NDArray

NOT_FINITE = "the logits are not finite numbers"

AllowedTokens: TypeAlias = "NDArray[np.uint32]"
"""One bit for each token, lowest bit first, in an array [vocabulary / 32, rounded up]. A set bit allows the token."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters. The defaults choose the most probable token. Steps are in the order of
    docs/internals/numerics.md."""

    temperature: float = number(
        (0.0, 100.0),
        1.0,
        "Sampling temperature, which divides the logits; 0 for greedy.",
        neutral=0.0,
        llamacpp=0.8,
        ollama=0.8,
        gguf="temp",
    )
    top_k: int = number(
        (0, MAX_TOP_K),
        0,
        "Keeps only this many of the most probable tokens; 0 keeps all.",
        "N",
        llamacpp=40,
        ollama=40,
        gguf="top_k",
    )
    top_p: float = number(
        (0.0, 1.0),
        1.0,
        "Keeps the most probable tokens up to this cumulative probability; 1 keeps all.",
        "P",
        llamacpp=0.95,
        ollama=0.9,
        gguf="top_p",
    )
    min_p: float = number(
        (0.0, 1.0),
        0.0,
        "Keeps tokens with at least this fraction of the top token's probability; 0 keeps all.",
        "P",
        llamacpp=0.05,
        gguf="min_p",
    )
    repetition_penalty: float = number(
        (1 / MAX_PENALTY, MAX_PENALTY),
        1.0,
        "Divides positive and multiplies negative logits of tokens that occurred; 1 for off.",
        ollama=1.1,
        llamacpp_name="repeat_penalty",
        gguf="penalty_repeat",
    )
    frequency_penalty: float = number(
        (-MAX_PENALTY, MAX_PENALTY), 0.0, "Subtracted from a token's logit for each time it occurred; 0 for off."
    )
    presence_penalty: float = number(
        (-MAX_PENALTY, MAX_PENALTY), 0.0, "Subtracted from a token's logit if it occurred; 0 for off."
    )
    # Pairs (token id, number added to the token's logit), in ascending order of id.
    logit_bias: tuple[tuple[int, float], ...] = ()
    chain: SamplerChain | None = None  # More samplers, or another order of samplers.

    @property
    def needs_history(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def needs_state(self) -> bool:
        """True if a choice depends on more than the earlier tokens. Mirostat depends on `mu` in the last result."""
        return self.chain is not None and self.chain.mirostat != 0

    @property
    def for_drafts(self) -> SamplingParams:
        return replace(self, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, chain=None)


PARAMS: Final = rows_of(SamplingParams)


@dataclass(frozen=True, slots=True)
class _Windows:
    repeat_last_n: int = number(
        (-1, MAX_CONTEXT_TOKENS),
        -1,
        "Number of last tokens, in prompt and answer together, that penalties count; -1 for all.",
        "N",
        llamacpp=64,
        ollama=64,
        gguf="penalty_last_n",
    )
    dry_penalty_last_n: int = number(
        (-1, MAX_CONTEXT_TOKENS), -1, "Number of last tokens that DRY examines; -1 for all.", "N"
    )


SAMPLING_TABLE: Final[Mapping[str, SamplingField]] = {**PARAMS, **rows_of(_Windows), **CHAIN}
"""All numeric sampling parameters of a request, by OpenAI's names, or else by vLLM's or llama.cpp's names."""

MAIN_NUMBERS: Final = ("temperature", "top_k", "top_p", "min_p")
"""The parameters that a chat always shows. Their defaults are llama.cpp's."""


Tags: TypeAlias = tuple[Annotated[str, Text(1, MAX_TRIGGER_BYTES)], ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in llguidance's JSON. It covers the whole answer or, with `triggers`, only text after a trigger."""

    definition: Annotated[str, Text(1, MAX_GRAMMAR_BYTES)]
    triggers: Annotated[Tags, Size(0, MAX_TRIGGERS)] = ()
    origin: str = field(default="grammar", compare=False, metadata=LOCAL)  # Field of the request, for error messages.


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Tags around reasoning text. Any of `begins` opens reasoning, and any of `ends` closes it. When the reasoning has
    taken `budget` tokens, the tokens in `forced` end it."""

    begins: Annotated[Tags, Size(1, MAX_TRIGGERS)]
    ends: Annotated[Tags, Size(1, MAX_TRIGGERS)]
    forced: Annotated[
        tuple[Annotated[int, Integer(0, MAX_VOCABULARY - 1)], ...], Size(0, MAX_REASONING_END_TOKENS)
    ] = ()
    # Maximum number of tokens, or None for no limit.
    budget: Annotated[int, Integer(0, MAX_CONTEXT_TOKENS)] | None = None
    is_open: bool = False  # True if the prompt has opened the reasoning.
    repeats: bool = False  # True if reasoning may also follow content.
    delays_grammar: bool = False  # True if the answer's grammar does not apply to the reasoning.


@dataclass(frozen=True, slots=True)
class MatcherStart:
    """The values from which the last stage creates an answer's matcher. The matcher's state depends on nothing else."""

    key: int  # Identifies the answer within an epoch.
    grammar: Grammar | None
    tokens: tuple[int, ...] = ()  # The answer's tokens so far.
    reasoning: Reasoning | None = None
    may_force: bool = False  # Tokens that must follow a sampled token are returned together with it.
    drafts_forced: bool = False  # Tokens that must follow are returned as a draft, which is computed like any draft.


@dataclass(frozen=True, slots=True)
class MatcherRow:
    key: int  # Identifies the answer within an epoch.
    position: int  # Number of the answer's tokens before the token to sample.
    # Drafted token before this row. The row counts only if the previous row chose this token. Set by a stage.
    drafted: int | None = None


@dataclass(frozen=True, slots=True)
class SampleTask:
    """A token to sample from an output row. The random draw depends only on `seed`, `choice` and `position`."""

    params: SamplingParams
    seed: int  # Unsigned, 64 bits.
    choice: int  # Index of the choice among the request's `n` choices.
    position: int  # Position of the token to choose in the whole sequence.
    # Tokens for penalties and DRY, oldest first. Empty if there are no penalties and no DRY.
    history: Sequence[int] = ()
    suppressed: tuple[int, ...] = ()  # Token ids that must not be chosen (min_tokens).
    top_logprobs: int = 0
    history_rows: int = 0  # Number of the chunk's last tokens, up to this row's own token, that follow `history`.
    penalty_window: int | None = None  # Number of last tokens of the history that penalties count, or None for all.
    dry_window: int | None = None  # Number of last tokens of the history that DRY searches, or None for all.
    breakers: tuple[tuple[int, ...], ...] = ()  # Token sequences that end DRY's search for repetitions.
    mu: float = 0.0  # Mirostat's state after the previous token.
    matcher: MatcherRow | None = None  # Set if the answer has a grammar or a reasoning budget.

    def next(self) -> SampleTask:
        matcher = None if self.matcher is None else replace(self.matcher, position=self.matcher.position + 1)
        return SampleTask(
            self.params,
            self.seed,
            self.choice,
            self.position + 1,
            self.history,
            self.suppressed,
            self.top_logprobs,
            self.history_rows + 1 if self.history_rows else 0,
            self.penalty_window,
            self.dry_window,
            self.breakers,
            self.mu,
            matcher,
        )

    def is_next_to(self, before: SampleTask) -> bool:
        # Cheap tests that tell most tasks apart.
        is_near = self.position == before.position + 1 and self.seed == before.seed
        return is_near and self == before.next()


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Requests the logprob of a given token after an output row. Perplexity and `echo` need it."""

    token: int
    top_logprobs: int = 0


RowTask = SampleTask | ScoreTask


_SECOND_DRAW = 1 << 31


def second_draw(task: RowTask) -> RowTask:
    """Returns the task with an independent random draw, for a row whose first token the grammar refused."""
    return replace(task, choice=task.choice + _SECOND_DRAW) if isinstance(task, SampleTask) else task


class TopLogprobs(Sequence[tuple[int, float]]):
    """Pairs (token, float32 logprob), best first, stored as packed bytes because a long answer has a million pairs."""

    __slots__ = ("packed",)
    _PAIR: Final = struct.Struct("=if")

    def __init__(self, packed: bytes | bytearray) -> None:
        self.packed = packed

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, float]]) -> TopLogprobs:
        if isinstance(pairs, TopLogprobs):
            return pairs
        return cls(struct.pack("=" + "if" * len(pairs), *chain.from_iterable(pairs)))

    def __len__(self) -> int:
        return len(self.packed) // self._PAIR.size

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return self._PAIR.iter_unpack(self.packed)

    @overload
    def __getitem__(self, place: int) -> tuple[int, float]: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[tuple[int, float], ...]: ...
    def __getitem__(self, place: int | slice) -> tuple[int, float] | tuple[tuple[int, float], ...]:
        return tuple(self)[place]

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, tuple | TopLogprobs) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


@dataclass(frozen=True, slots=True)
class RowResult:
    """A chosen or scored token. Logprobs are the float32 log-softmax of the raw logits."""

    token: int
    logprob: float
    top_logprobs: Sequence[tuple[int, float]] = ()  # Pairs (token, logprob), best first.
    # Reason why the row has no answer, such as logits that are not finite. `token` is then -1 and `logprob` NaN.
    failure: str | None = None
    mu: float | None = None  # Mirostat's state for the next token.
    forced: tuple[int, ...] = ()  # Tokens that must follow `token`. The matcher has accepted them already.
    is_deferred: bool = False  # True if the row must be computed again. `token` is then -1 and `logprob` NaN.
    forced_draft: tuple[int, ...] = ()  # Tokens that must follow `token`, returned as a draft.
    drafted: tuple[int, ...] = ()  # Tokens that an MTP head drafted after `token`.
    is_request_fault: bool = False  # True if the request itself causes the failure, so that every worker would fail.
    matcher_ns: int = field(default=0, compare=False)  # CPU time of the row's matcher, or 0 if it was short.
