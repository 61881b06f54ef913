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

if TYPE_CHECKING:  # clients do not wait for it
    import numpy as np
    from numpy.typing import NDArray

NOT_FINITE = "the logits are not finite numbers"

AllowedTokens: TypeAlias = "NDArray[np.uint32]"
"""One bit for each token, lowest bit first. A set bit allows the token. Shape: [vocabulary / 32, rounded up]."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters. The defaults are greedy. docs/internals/numerics.md states the order of the steps."""

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
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit), ids ascending
    chain: SamplerChain | None = None  # more samplers, or another order

    @property
    def needs_history(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def needs_state(self) -> bool:
        """Returns whether a choice depends on more than earlier tokens. Mirostat needs the last result's mu."""
        return self.chain is not None and self.chain.mirostat != 0

    @property
    def for_drafts(self) -> SamplingParams:
        return replace(self, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, chain=None)


PARAMS: Final = rows_of(SamplingParams)


@dataclass(frozen=True, slots=True)
class _Windows:
    """The number of last tokens that penalties count, and the number that DRY searches. -1 means all tokens."""

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
"""All numeric sampling parameters of a request. Their names are OpenAI's, or else vLLM's or llama.cpp's."""

MAIN_NUMBERS: Final = ("temperature", "top_k", "top_p", "min_p")
"""The parameters that a chat always shows. Their defaults are llama.cpp's."""


Tags: TypeAlias = tuple[Annotated[str, Text(1, MAX_TRIGGER_BYTES)], ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in llguidance's JSON. It covers the whole answer or, with `triggers`, the text from the first on."""

    definition: Annotated[str, Text(1, MAX_GRAMMAR_BYTES)]
    triggers: Annotated[Tags, Size(0, MAX_TRIGGERS)] = ()
    origin: str = field(default="grammar", compare=False, metadata=LOCAL)  # the request's field, for messages


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Tags around reasoning text. Any of `begins` opens it, and any of `ends` closes it. After `budget` tokens of
    reasoning, the tokens in `forced` end it."""

    begins: Annotated[Tags, Size(1, MAX_TRIGGERS)]
    ends: Annotated[Tags, Size(1, MAX_TRIGGERS)]
    forced: Annotated[
        tuple[Annotated[int, Integer(0, MAX_VOCABULARY - 1)], ...], Size(0, MAX_REASONING_END_TOKENS)
    ] = ()
    budget: Annotated[int, Integer(0, MAX_CONTEXT_TOKENS)] | None = None  # None: no limit
    is_open: bool = False  # the prompt has begun it
    repeats: bool = False  # it may also stand behind content
    delays_grammar: bool = False  # the answer's grammar does not apply to it


@dataclass(frozen=True, slots=True)
class MatcherStart:
    """The values from which the last stage creates an answer's matcher. They alone determine the matcher's state."""

    key: int  # of the answer, within an epoch
    grammar: Grammar | None
    tokens: tuple[int, ...] = ()  # of the answer, so far
    reasoning: Reasoning | None = None
    may_force: bool = False  # tokens that must follow a sampled one are wanted with it
    drafts_forced: bool = False  # or as a draft, and computed like all others


@dataclass(frozen=True, slots=True)
class MatcherRow:
    key: int  # of the answer, within an epoch
    position: int  # tokens of the answer before the one to be sampled
    drafted: int | None = None  # the last of these, where the row counts only if that is the one before; set by a stage


@dataclass(frozen=True, slots=True)
class SampleTask:
    """A token to sample from an output row. The random draw depends only on `seed`, `choice` and `position`."""

    params: SamplingParams
    seed: int  # 64 bits, unsigned
    choice: int  # index among a request's n choices
    position: int  # absolute position of the token to be chosen
    history: Sequence[int] = ()  # tokens that penalties and DRY look at, oldest first; empty where there are none
    suppressed: tuple[int, ...] = ()  # ids that may not be chosen (min_tokens)
    top_logprobs: int = 0
    history_rows: int = 0  # so many newest tokens of its chunk, up to the row's own, follow in the history
    penalty_window: int | None = None  # newest tokens of the history that penalties count; None: all
    dry_window: int | None = None  # and that DRY looks at
    breakers: tuple[tuple[int, ...], ...] = ()  # token sequences that DRY does not look beyond
    mu: float = 0.0  # of Mirostat, from the token before
    matcher: MatcherRow | None = None  # of an answer with a grammar or a budget of reasoning

    def next(self) -> SampleTask:
        """Returns the task for the chunk's next row, whose input is a drafted token."""
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
        is_near = self.position == before.position + 1 and self.seed == before.seed  # most are told apart by these
        return is_near and self == before.next()


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Requests the logprob of a given token after an output row, for perplexity or echo."""

    token: int
    top_logprobs: int = 0


RowTask = SampleTask | ScoreTask


_SECOND_DRAW = 1 << 31


def second_draw(task: RowTask) -> RowTask:
    """Returns the task with an independent random draw. It serves a row whose first token the grammar refused."""
    return replace(task, choice=task.choice + _SECOND_DRAW) if isinstance(task, SampleTask) else task


class TopLogprobs(Sequence[tuple[int, float]]):
    """Pairs (token, float32 logprob), best first. They are packed bytes, since a long answer has a million pairs."""

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
    """A chosen or scored token. Logprobs are float32 log-softmax values of the raw logits."""

    token: int
    logprob: float
    top_logprobs: Sequence[tuple[int, float]] = ()  # (token, logprob), best first
    failure: str | None = None  # why this row has no answer (logits not finite); then token is -1, logprob NaN
    mu: float | None = None  # of Mirostat, for the next token
    forced: tuple[int, ...] = ()  # tokens that must follow it, and are taken in
    is_deferred: bool = False  # the row is to be computed again; then token is -1, logprob NaN
    forced_draft: tuple[int, ...] = ()  # tokens that must follow it, as a draft
    drafted: tuple[int, ...] = ()  # tokens that may follow it, by an MTP head
    is_request_fault: bool = False  # the request is the failure's cause: every worker would fail so
    matcher_ns: int = field(default=0, compare=False)  # processor time of its matcher, where it is worth telling
