"""Chooses which sequences start or are preempted, so that owners (API clients) and the requests of each owner get fair
shares. All prompts and choices of an API request count as one request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Reversible
from collections.abc import Sequence as Items
from dataclasses import dataclass
from heapq import nsmallest

from llamaclust.cluster.scheduler.sequences import Phase, Sequence

_LARGE_GRAMMAR = 1 << 12
"""Number of characters above which a grammar is large."""
_MOST_MATCHERS = 2
"""Maximum number of large grammars per owner that wait for a matcher at the same time."""


def request_key(sequence: Sequence) -> str:
    return sequence.request.group or sequence.request.request_id


@dataclass(frozen=True, slots=True)
class RunningCounts:
    owners: Counter[str]
    requests: Counter[str]

    @classmethod
    def of(cls, running: Iterable[Sequence]) -> RunningCounts:
        owners, requests = Counter[str](), Counter[str]()
        for sequence in running:
            owners[sequence.request.owner] += 1
            requests[request_key(sequence)] += 1
        return cls(owners, requests)

    def with_another(self, sequence: Sequence) -> RunningCounts:
        return RunningCounts(
            self.owners + Counter([sequence.request.owner]), self.requests + Counter([request_key(sequence)])
        )

    def rank(self, sequence: Sequence) -> tuple[int, int]:
        """Returns the numbers of running sequences of the owner and of the request. The lowest rank starts next."""
        return self.owners[sequence.request.owner], self.requests[request_key(sequence)]


def startable(waiting: Iterable[Sequence], running: Iterable[Sequence]) -> list[Sequence]:
    """Returns the waiting sequences that may start. An owner's sequences with a large grammar must wait while
    `_MOST_MATCHERS` matchers for large grammars are being made for this owner."""
    making = Counter(other.request.owner for other in running if other.phase is Phase.PREFILL and _is_large(other))
    if not making:
        return [*waiting]
    return [one for one in waiting if making[one.request.owner] < _MOST_MATCHERS or not _is_large(one)]


def _is_large(sequence: Sequence) -> bool:
    grammar = sequence.request.grammar
    return grammar is not None and len(grammar.definition) > _LARGE_GRAMMAR


def in_turn(waiting: Iterable[Sequence], running: RunningCounts, most: int) -> list[Sequence]:
    return nsmallest(most, waiting, key=running.rank)


def first_in_turn(waiting: Iterable[Sequence], running: RunningCounts) -> Sequence:
    return min(waiting, key=running.rank)


def preemption_victim(running: Reversible[Sequence], counts: RunningCounts) -> Sequence:
    """Returns the sequence to preempt. Chooses the owner with the most running sequences, then this owner's request
    with the most, then this request's youngest sequence. `running` begins with the oldest sequence."""
    return max(reversed(running), key=counts.rank)


def turn_victims(sequence: Sequence, running: Items[Sequence], counts: RunningCounts) -> list[Sequence]:
    """Returns the running sequences that may be preempted to make room for `sequence`, in the order of preemption. A
    preempted sequence will not be due before `sequence`. `running` begins with the oldest sequence."""
    counts, left, victims = RunningCounts(counts.owners.copy(), counts.requests.copy()), [*running], list[Sequence]()
    while (victim := _turn_victim(sequence, left, counts)) is not None:
        left.remove(victim)
        counts.owners[victim.request.owner] -= 1
        counts.requests[request_key(victim)] -= 1
        victims.append(victim)
    return victims


def takes_turn(sequence: Sequence, running: Items[Sequence], counts: RunningCounts) -> bool:
    """Returns True if `sequence` is due to take the place of a running sequence, which must be preempted."""
    return _turn_victim(sequence, running, counts) is not None


def _turn_victim(sequence: Sequence, running: Items[Sequence], counts: RunningCounts) -> Sequence | None:
    owner, request = counts.rank(sequence)
    if not running or request:
        return None
    own = sequence.request.owner

    def rank(other: Sequence) -> tuple[int, bool, int]:
        of_owner, of_request = counts.rank(other)
        return of_owner, other.request.owner == own, of_request

    most_of_owner, is_own, most_of_request = rank(victim := max(reversed(running), key=rank))
    # A victim of another owner with as many sequences would be next in turn again.
    is_due = most_of_request > 1 and (is_own or owner < most_of_owner) if owner else most_of_owner > 1
    return victim if is_due else None
