"""Defines the workloads by which splits are compared: one typical request alone, or several concurrent requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llamaclust.cluster.planner.plan import ANSWER_TOKENS

CHUNKS: Final = (1, 2, 4, 8, 16)
"""Numbers of equal chunks into which a prompt may be divided. Stages compute the chunks one after another."""
TOGETHER: Final = 8


@dataclass(frozen=True, slots=True)
class Rows:
    """Equal steps. A step's rows are tokens of one prompt, or one token from each of `rows` sequences."""

    rows: int
    steps: float
    is_prompt: bool = False
    concurrent: bool = False  # other stages of the machine compute meanwhile


@dataclass(frozen=True, slots=True)
class Work:
    """A workload that rates a split. The rating is the slowest stage's time for `slowest`. If `adds_up` is set, the
    times of all stages for `each` are added."""

    slowest: tuple[Rows, ...]
    slowest_rows: int  # rows that a link carries meanwhile
    each: tuple[Rows, ...]
    hops: int  # messages from stage to stage
    hop_rows: int  # rows of these messages
    adds_up: bool

    def seconds(self, slowest: float, total: float) -> float:
        return slowest + total if self.adds_up else slowest


def works_of(objective: str, prompt_tokens: int) -> tuple[Work, ...]:
    """Returns the objective's workloads, which differ in the number of chunks. A split's rating is its best time."""
    if objective == "latency":
        return tuple(_request(prompt_tokens, chunks) for chunks in CHUNKS)
    steps = (
        Rows(prompt_tokens, 1, is_prompt=True, concurrent=True),
        Rows(TOGETHER, ANSWER_TOKENS / TOGETHER, concurrent=True),
    )
    return (Work(steps, prompt_tokens, (Rows(1, 1),), hops=1, hop_rows=1, adds_up=False),)


def _request(prompt_tokens: int, chunks: int) -> Work:
    """Returns a request's workload. The first chunk passes all stages. The slowest stage delays every other chunk."""
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
