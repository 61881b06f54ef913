"""Tokens, logprobs and numbers of embeddings that replies hold in memory, and prompts that are ranked: counted before a
request is admitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from llamaclust.cluster.front.text.threads import current_owner
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.core.errors import ParameterError, QueueFullError
from llamaclust.core.limits import MAX_TOP_LOGPROBS
from llamaclust.core.sharing.shares import fits

MAX_REPLY_ENTRIES = 1 << 21
"""One reply has at most so many tokens and top logprobs."""
UNIT_BYTES = 200
MAX_HELD_UNITS = 1 << 21
"""The most that an owner's replies with logprobs or embeddings take, and prompts that are ranked; all owners together
have at most twice as much, see `fits`."""
_UNIT_NUMBERS = 5
"""Numbers of an embedding, or tokens of prompts, that take a unit."""
_TOP_BYTES = 8
_RETRY_S = 5.0


class RowStorage(Enum):
    """A reply holds rows in one of these ways."""

    STREAMED = auto()  # the first prompt's are dropped as they come, the others wait
    CHUNKS = auto()
    PACKED = auto()

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes beside its top logprobs."""
        return 40 if self is RowStorage.PACKED else 600


@dataclass(frozen=True, slots=True)
class ReplySize:
    """The most that the completion of one prompt gives."""

    rows: int  # scored and sampled tokens of all choices
    top_logprobs: int  # a row
    has_logprobs: bool  # beside the chosen tokens' own
    storage: RowStorage

    @classmethod
    def of(
        cls, generation: GenerationRequest, choices: int, storage: RowStorage, unread_rows: int | None = None
    ) -> ReplySize:
        """`unread_rows`: sampled ones that are held at most, where the answer is read while it runs."""
        first = generation.score_from
        scored = 0 if first is None else max(0, len(generation.prompt) - max(first, 1))
        sampled = choices * generation.max_new_tokens
        if unread_rows is not None:
            sampled = min(sampled, unread_rows)
        top = max(0, min(generation.top_logprobs, MAX_TOP_LOGPROBS))  # validated later
        return cls(choices * scored + sampled, top, top > 0 or scored > 0, storage)

    @property
    def entries(self) -> int:
        return self.rows * (1 + self.top_logprobs)

    @property
    def held_bytes(self) -> int:
        return self.rows * (self.storage.row_bytes + self.top_logprobs * _TOP_BYTES)


@dataclass(frozen=True, slots=True)
class Reservation:
    """Units of the budget that a request has taken."""

    owner: str
    units: int


NOTHING: Final = Reservation("", 0)


class ReplyBudget:
    """What all replies may hold. Plain tokens of an answer count for its own bound alone: few answers are as long as
    they may be."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()  # by owner

    @property
    def held(self) -> int:
        """Units that all owners hold."""
        return self._held.total()

    def reserve(self, sizes: Sequence[ReplySize]) -> Reservation:
        """Takes what a request needs, to be `release`d. ParameterError where it is more than any request may have,
        QueueFullError where the current owner's other requests, or those of all, hold too much at present."""
        rows, top = sum(size.rows for size in sizes), max((size.top_logprobs for size in sizes), default=0)
        units = -(-sum(size.held_bytes for size in sizes if size.has_logprobs) // UNIT_BYTES)
        if (entries := sum(size.entries for size in sizes)) > MAX_REPLY_ENTRIES:
            excess = f"are {entries} entries, at most {MAX_REPLY_ENTRIES} are given in one reply"
        elif units > MAX_HELD_UNITS:
            excess = f"take {_mib(units)} MiB, at most {_mib(MAX_HELD_UNITS)} MiB are held for one reply"
        else:
            return self._take(units)
        advice = "lower max_tokens, n or logprobs, or send fewer prompts at once"
        reason = f"{rows} tokens with {top} top logprobs each {excess}: {advice}"
        raise ParameterError("logprobs" if top else "max_tokens", reason, "reply_too_large")

    def reserve_numbers(self, count: int) -> Reservation:
        """Likewise for the numbers of embeddings."""
        most = MAX_REPLY_ENTRIES * _UNIT_NUMBERS
        if count > most:
            reason = f"embeddings of {count} numbers, at most {most} are given in one reply: send less at once"
            raise ParameterError("input", reason, "reply_too_large")
        return self._take(-(-count // _UNIT_NUMBERS))

    def reserve_pairs(self, tokens: int) -> Reservation:
        """Likewise for the tokens of all prompts of one query."""
        most = MAX_REPLY_ENTRIES * _UNIT_NUMBERS
        if tokens > most:
            reason = (
                f"with the query before each these are {tokens} tokens, at most {most} are ranked: send fewer at once"
            )
            raise ParameterError("documents", reason, "reply_too_large")
        return self._take(-(-tokens // _UNIT_NUMBERS))

    def release(self, reserved: Reservation) -> None:
        self._held[reserved.owner] -= reserved.units
        if not self._held[reserved.owner]:
            del self._held[reserved.owner]

    def _take(self, units: int) -> Reservation:
        owner = current_owner.get()
        if not fits(self._held[owner], self.held, MAX_HELD_UNITS, units):
            raise QueueFullError(f"replies of up to {_mib(self.held)} MiB are under way; try again", _RETRY_S)
        self._held[owner] += units
        return Reservation(owner, units)


def _mib(units: int) -> int:
    return -(-units * UNIT_BYTES >> 20)
