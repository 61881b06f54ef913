"""What a draft model is asked for, and what it answers: its tokens are drafts for the answers of a larger model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llamaclust.core.sampling import SampleTask

MOST_ORDERS = 8
"""That are given together. A model computes more sequences' tokens with the weights it reads for one anyhow."""


@dataclass(frozen=True, slots=True)
class DraftOrder:
    """A draft of what follows the first `length` tokens of a sequence."""

    key: int  # of the sequence
    tokens: Sequence[int]  # they may grow meanwhile, and do not change
    length: int
    most: int  # drafted tokens; 0: the model only takes in tokens that it does not have yet
    task: SampleTask  # how the first one is chosen


@dataclass(frozen=True, slots=True)
class DraftReply:
    """To one order."""

    key: int
    length: int  # as in the order
    is_draft: bool  # else tokens were only to be taken in
    tokens: tuple[int, ...]
    taken_in: int  # tokens of the sequence of which the model has keys and values


@dataclass(frozen=True, slots=True)
class DraftReplies:
    """To orders that were given together, in their order, and how long the model took."""

    replies: tuple[DraftReply, ...]
    rows: int = 0  # that only took in tokens
    rows_ns: int = 0
    steps: int = 0  # in which each order that was drafted for got a token
    steps_ns: int = 0
