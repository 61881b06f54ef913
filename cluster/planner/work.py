"""The work by which splits are compared: a usual request alone, or several at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llamaclust.cluster.planner.plan import ANSWER_TOKENS

CHUNKS: Final = (1, 2, 4, 8, 16)
"""The possible numbers of equal chunks of a prompt. Stages compute the chunks one after another."""
TOGETHER: Final = 8


@dataclass(frozen=True, slots=True)
class Rows:
    """Steps of `rows` rows each: tokens of a prompt, or one token from each of `rows` sequences."""

    rows: int
    steps: float
    is_prompt: bool = False
    concurrent: bool = False  # other stages of the machine compute meanwhile


@dataclass(frozen=True, slots=True)
class Work:
    """The work by which a split is judged: the slowest stage's time for `slowest`, plus all stages' times for `each` if
    `adds_up` is set."""

    slowest: tuple[Rows, ...]
    slowest_rows: int  # rows that a link carries meanwhile
    each: tuple[Rows, ...]
    hops: int  # messages from stage to stage
    hop_rows: int  # rows of these messages
    adds_up: bool

    def seconds(self, slowest: float, total: float) -> float:
        return slowest + total if self.adds_up else slowest


def works_of(objective: str, prompt_tokens: int) -> tuple[Work, ...]:
    """Returns alternative works of the objective. A split is judged by the work that takes it the least time."""
    if objective == "latency":
        return tuple(_request(prompt_tokens, chunks) for chunks in CHUNKS)
    steps = (
        Rows(prompt_tokens, 1, is_prompt=True, concurrent=True),
        Rows(TOGETHER, ANSWER_TOKENS / TOGETHER, concurrent=True),
    )
    return (Work(steps, prompt_tokens, (Rows(1, 1),), hops=1, hop_rows=1, adds_up=False),)


def _request(prompt_tokens: int, chunks: int) -> Work:
    """Returns the work of a request: one chunk through all stages, then the slowest stage for each other chunk."""
    rows = -(-prompt_tokens // chunks)
    chunk = Rows(rows, 1, is_prompt=True, concurrent=chunks > 1)
    behind = (Rows(rows, chunks - 1, is_prompt=True, concurrent=True),) if chunks > 1 else ()
    return Work(
        slowest=behind,
        slowest_rows=(chunks - 1) * rows,
        each=(chunk, Rows(1, ANSWER_TOKENS)),
        hops=ANSWER_TOKENS,
        hop_rows=ANSWER_TOKENS + rows,
        adds_up=True,
    )
