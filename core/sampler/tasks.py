"""Tasks of output rows: to sample a token, or to score a given token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llamaclust.core.sampler.params import SamplingParams


@dataclass(frozen=True, slots=True)
class MatcherRow:
    key: int  # Identifies the answer within an epoch.
    position: int  # Number of the answer's tokens before the token to sample.
    # Drafted token that this row reads. The row counts only if the previous row chose this token. Set by a stage.
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
    # Number of the chunk's tokens that follow `history`. The last of them is this row's own token.
    history_rows: int = 0
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


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """A request for the logprob of a given token after an output row. Perplexity and `echo` use it."""

    token: int
    top_logprobs: int = 0


RowTask = SampleTask | ScoreTask
