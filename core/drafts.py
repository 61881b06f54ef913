"""Orders to a draft model, and its replies. A draft model generates drafts: tokens that a larger model may accept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llamaclust.core.sampling import SampleTask

MOST_ORDERS = 8
"""The largest number of orders in one call of the draft model. One pass over its weights serves all of them."""


@dataclass(frozen=True, slots=True)
class DraftOrder:
    key: int  # of the sequence
    tokens: Sequence[int]  # they may grow meanwhile, and do not change
    length: int
    most: int  # drafted tokens; 0: the model only takes in tokens that it does not have yet
    task: SampleTask  # how the first one is chosen


@dataclass(frozen=True, slots=True)
class DraftReply:
    key: int
    length: int  # as in the order
    is_draft: bool  # else tokens were only to be taken in
    tokens: tuple[int, ...]
    taken_in: int  # tokens of the sequence of which the model has keys and values


@dataclass(frozen=True, slots=True)
class DraftReplies:
    replies: tuple[DraftReply, ...]
    rows: int = 0  # that only took in tokens
    rows_ns: int = 0
    steps: int = 0  # in which each order that was drafted for got a token
    steps_ns: int = 0
