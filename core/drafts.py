"""Orders to a draft model, and its replies. A draft is a list of tokens that the larger model may accept or reject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llamaclust.core.sampler.tasks import SampleTask

MOST_ORDERS = 8
"""Maximum number of orders in one call of the draft model. All of them share one pass over the model's weights."""


@dataclass(frozen=True, slots=True)
class DraftOrder:
    key: int  # Identifies the sequence.
    tokens: Sequence[int]  # The sequence's tokens. More may be appended while the draft is computed.
    length: int  # Number of tokens to use.
    most: int  # Maximum number of tokens to draft. 0 only prefills tokens that the model lacks.
    task: SampleTask  # Sampling task for the first drafted token.


@dataclass(frozen=True, slots=True)
class DraftReply:
    key: int
    length: int  # The order's `length`.
    is_draft: bool  # False if the order only asked for a prefill.
    tokens: tuple[int, ...]
    taken_in: int  # Number of the sequence's tokens whose keys and values the model holds.


@dataclass(frozen=True, slots=True)
class DraftReplies:
    replies: tuple[DraftReply, ...]
    rows: int = 0  # Number of rows that were only prefilled.
    rows_ns: int = 0
    steps: int = 0  # Number of steps. Each step drafts one token for each unfinished order.
    steps_ns: int = 0
