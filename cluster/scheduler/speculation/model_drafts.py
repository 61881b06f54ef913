"""Decides when a draft model drafts, how many tokens it drafts, and which prompts it reads in advance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items

from llamaclust.cluster.scheduler.drafting.drafter import MODEL
from llamaclust.cluster.scheduler.sequences import Sequence
from llamaclust.cluster.scheduler.speculation.costs import HOPEFUL_RATE, MARGIN, MeasuredRounds, counts_to_try
from llamaclust.cluster.scheduler.speculation.draft_model import DraftModel
from llamaclust.cluster.scheduler.speculation.drafts import expected
from llamaclust.cluster.scheduler.speculation.retry import Retry
from llamaclust.core.drafts import MOST_ORDERS, DraftOrder, DraftReplies
from llamaclust.core.sampler.tasks import SampleTask

_CLOSE = 64
"""A step waits for the model only if the model has at most this number of the sequence's tokens left to read."""
_WORTH = 2.0
"""Minimum ratio of the time that drafts save to the time for reading the prompt."""


class ModelDrafts:
    def __init__(self, model: DraftModel, rounds: MeasuredRounds) -> None:
        self.model = model
        self._times = model.times
        self._rounds = rounds
        self._orders: list[DraftOrder] = []  # Orders that were not sent to the model yet.
        self._awaited: set[int] = set()  # Keys of sequences that wait for a draft.
        self._taken_in: dict[int, int] = {}  # Number of tokens that the model has read, by sequence key.
        self._without_room: set[int] = set()
        self._retries: dict[int, Retry] = {}

    def awaits(self, sequence: Sequence) -> bool:
        return sequence.key in self._awaited

    def length(self, sequences: Items[Sequence], most: Mapping[int, int], speed: float) -> int:
        """Returns how many tokens the draft model should draft, or 0 if drafting would cost more time than it saves.
        `most` has the maximum number by sequence key. `speed` is the tokens per nanosecond without the draft model."""
        drafted = [each for each in sequences if most.get(each.key) and self._is_close(each)]
        if not drafted or len(sequences) + len(self._awaited) > MOST_ORDERS:
            return 0
        longest = min(most[each.key] for each in drafted)
        count = self._length(drafted, longest, len(sequences), speed, hopeful=False)
        if not count and any(map(self._is_due, drafted)):
            return self._length(drafted, longest, len(sequences), speed, hopeful=True)
        return count

    def _length(self, drafted: Items[Sequence], longest: int, together: int, speed: float, *, hopeful: bool) -> int:
        lacking = sum(map(self._lacking, drafted))
        least = HOPEFUL_RATE if hopeful else 0.0
        rates = [max(each.drafting.rate(MODEL), least) for each in drafted]
        best, best_speed = 0, (1 + MARGIN) * speed
        for count in counts_to_try(longest):
            tokens = together + sum(expected(rate, count) for rate in rates)
            drafts_ns = self._times.draft_ns(len(drafted), count, lacking, at_best=hopeful)
            round_ns = self._rounds.window_ns(together + count * len(drafted), 1) + drafts_ns
            if tokens / round_ns > best_speed:
                best, best_speed = count, tokens / round_ns
        return best

    def order(self, sequences: Iterable[Sequence], most: Mapping[int, int], count: int) -> list[Sequence]:
        """Requests drafts of up to `count` tokens for sequences in `most`, if the draft model has read nearly all their
        tokens. Returns the other sequences."""
        others = []
        for sequence in sequences:
            if most.get(sequence.key) and self._is_close(sequence):
                self._awaited.add(sequence.key)
                self._retry_of(sequence).ordered(len(sequence.tokens))
                self._orders.append(_order(sequence, min(count, most[sequence.key])))
            else:
                others.append(sequence)
        return others

    def next_orders(self, running: Iterable[Sequence]) -> list[DraftOrder]:
        orders, self._orders = self._orders[:MOST_ORDERS], self._orders[MOST_ORDERS:]
        if orders:
            return orders
        decoding = [sequence for sequence in running if sequence.may_draft and sequence.images is None]
        if len(decoding) > MOST_ORDERS:
            return []
        lacking = next((sequence for sequence in decoding if self._is_worth(sequence)), None)
        return [] if lacking is None else [_order(lacking, 0)]

    def drafted(self, replies: DraftReplies, taken_ns: int, sequences: Mapping[int, Sequence]) -> None:
        self._times.learn(replies, taken_ns)
        for reply in replies.replies:
            if all(order.key != reply.key for order in self._orders):  # The sequence may have another order.
                self._awaited.discard(reply.key)
            if (sequence := sequences.get(reply.key)) is None:
                continue
            self._taken_in[reply.key] = reply.taken_in
            if not reply.taken_in:
                self._without_room.add(reply.key)
            if reply.is_draft and sequence.drafting.drafts is not None:
                sequence.drafting.drafts.offer(sequence.tokens, reply.length, reply.tokens)

    def forget(self, key: int) -> None:
        self._awaited.discard(key)
        self._without_room.discard(key)
        self._retries.pop(key, None)
        self._taken_in.pop(key, None)
        self._orders = [order for order in self._orders if order.key != key]

    def _lacking(self, sequence: Sequence) -> int:
        return len(sequence.tokens) - self._taken_in.get(sequence.key, 0)

    def _is_close(self, sequence: Sequence) -> bool:
        return self._lacking(sequence) <= _CLOSE and sequence.key not in self._without_room

    def _is_due(self, sequence: Sequence) -> bool:
        return self._retry_of(sequence).is_due(len(sequence.tokens))

    def _retry_of(self, sequence: Sequence) -> Retry:
        retry = self._retries.get(sequence.key)
        if retry is None:
            retry = self._retries[sequence.key] = Retry.after(len(sequence.tokens))
        return retry

    def _is_worth(self, sequence: Sequence) -> bool:
        lacking = self._lacking(sequence)
        if lacking <= _CLOSE // 2 or sequence.key in self._without_room or sequence.drafting.drafts is None:
            return False
        plain_ns, is_due = self._rounds.plain_ns(1, 1), self._is_due(sequence)
        rate = max(sequence.drafting.rate(MODEL), HOPEFUL_RATE) if is_due else sequence.drafting.rate(MODEL)

        def round_ns(count: int) -> float:
            return self._rounds.window_ns(1 + count, 1) + self._times.draft_ns(1, count, 1, at_best=is_due)

        token_ns = min(round_ns(count) / (1 + expected(rate, count)) for count in counts_to_try(_CLOSE // 4))
        return sequence.left * (plain_ns / (1 + MARGIN) - token_ns) > _WORTH * self._times.take_in_ns(lacking)


def _order(sequence: Sequence, most: int) -> DraftOrder:
    request, length = sequence.request, len(sequence.tokens)
    delayed = request.delayed_ids if sequence.generated < request.min_tokens else ()
    task = SampleTask(request.params.for_drafts, request.seed, request.choice, position=length, suppressed=delayed)
    return DraftOrder(sequence.key, sequence.tokens, length, most, task)
