from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llamaclust.cluster.planner.plan import ANSWER_TOKENS

CHUNKS: Final = (1, 2, 4, 8, 16)
"""Numbers of equal chunks into which a prompt can be divided. Stages compute the chunks one after another."""
TOGETHER: Final = 8


@dataclass(frozen=True, slots=True)
class Rows:
    """A number of equal steps, each for `rows` tokens of one prompt or for one token of each of `rows` sequences."""

    rows: int
    steps: float
    is_prompt: bool = False
    concurrent: bool = False  # True if other stages on the machine compute at the same time.


@dataclass(frozen=True, slots=True)
class Work:
    """A workload for comparing splits. A split's time is its slowest stage's time for the steps in `slowest`. If
    `adds_up` is true, the time of all stages together for the steps in `each` is added."""

    slowest: tuple[Rows, ...]
    slowest_rows: int  # Number of rows that each link carries during the steps in `slowest`.
    each: tuple[Rows, ...]
    hops: int  # Number of messages between stages.
    hop_rows: int  # Total rows of the messages that `hops` counts.
    adds_up: bool

    def seconds(self, slowest: float, total: float) -> float:
        return slowest + total if self.adds_up else slowest


def works_of(objective: str, prompt_tokens: int) -> tuple[Work, ...]:
    """Returns the workloads of an objective. They divide the prompt into different numbers of chunks. A split is rated
    by its fastest workload."""
    if objective == "latency":
        return tuple(_request(prompt_tokens, chunks) for chunks in CHUNKS)
    steps = (
        Rows(prompt_tokens, 1, is_prompt=True, concurrent=True),
        Rows(TOGETHER, ANSWER_TOKENS / TOGETHER, concurrent=True),
    )
    return (Work(steps, prompt_tokens, (Rows(1, 1),), hops=1, hop_rows=1, adds_up=False),)


def _request(prompt_tokens: int, chunks: int) -> Work:
    rows = -(-prompt_tokens // chunks)
    chunk = Rows(rows, 1, is_prompt=True, concurrent=chunks > 1)
    # Each later chunk adds only the time of the slowest stage, because stages work at the same time.
    behind = (Rows(rows, chunks - 1, is_prompt=True, concurrent=True),) if chunks > 1 else ()
    return Work(
        slowest=behind,
        slowest_rows=(chunks - 1) * rows,
        each=(chunk, Rows(1, ANSWER_TOKENS)),
        hops=ANSWER_TOKENS,
        hop_rows=ANSWER_TOKENS + rows,
        adds_up=True,
    )
