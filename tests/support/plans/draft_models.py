"""Simulations with a draft model of given drafts and given times."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from llamaclust.cluster.scheduler.speculation.draft_model import DraftTimes
from llamaclust.cluster.scheduler.speculation.model_drafts import ModelDrafts
from llamaclust.core.drafts import DraftOrder, DraftReplies, DraftReply
from support.clusters.fakes import Simulation

Says = Callable[[Sequence[int], int], tuple[int, ...]]
MOST_ROWS = 256


class SaidModel:
    """A draft model with given drafts and given times of a step and a row."""

    def __init__(self, says: Says, step_ns: int, row_ns: int, room: int = 8) -> None:
        """`room`: the number of sequences that it can hold."""
        self.times = DraftTimes(step_ns, row_ns)
        self.is_lost = False
        self.asked: list[DraftOrder] = []
        self.late_ns: list[int] = []  # extra times of the next drafts
        self._says = says
        self._step_ns = step_ns
        self._row_ns = row_ns
        self._room = room
        self._taken_in: dict[int, int] = {}

    def lose(self) -> None:
        self.is_lost = True

    async def draft(self, orders: Sequence[DraftOrder]) -> DraftReplies:
        """Returns the replies to an engine's orders."""
        return self.reply(orders)[0]

    def reply(self, orders: Sequence[DraftOrder]) -> tuple[DraftReplies, int]:
        """Returns the replies and the time that they took."""
        replies, rows, rows_ns, most = [], 0, 0, 0
        for order in orders:
            self.asked.append(order)
            before = self._taken_in.pop(order.key, 0)
            if len(self._taken_in) >= self._room:
                del self._taken_in[next(iter(self._taken_in))]
            lacking = order.length - before
            drafted: tuple[int, ...] = ()
            if order.most and lacking <= MOST_ROWS:
                drafted = self._says(order.tokens[: order.length], order.most)
                most, taken = max(most, len(drafted)), lacking
                rows_ns += (lacking - 1) * self._row_ns
            else:
                taken = min(MOST_ROWS, lacking - 1)
                rows, rows_ns = rows + taken, rows_ns + taken * self._row_ns
            self._taken_in[order.key] = before + taken
            replies.append(DraftReply(order.key, order.length, order.most > 0, drafted, before + taken))
        steps_ns = most * self._step_ns
        late_ns = self.late_ns.pop(0) if most and self.late_ns else 0
        return DraftReplies(tuple(replies), rows, rows_ns if rows else 0, most, steps_ns), rows_ns + steps_ns + late_ns


@dataclass
class DraftingSimulation(Simulation):
    """A simulation with the draft model of the scheduler's settings, which must be a `SaidModel`."""

    replies: tuple[int, DraftReplies, int] | None = None  # time of arrival, replies, time that they took

    @property
    def drafts(self) -> ModelDrafts | None:
        assert self.scheduler.speculation is not None
        return self.scheduler.speculation.model_drafts

    def send_all(self) -> None:
        super().send_all()
        running = self.scheduler.queues.running
        if self.replies is None and self.drafts is not None and (orders := self.drafts.next_orders(running)):
            assert isinstance(self.drafts.model, SaidModel)
            replies, taken_ns = self.drafts.model.reply(orders)
            self.replies = self.now_ns + taken_ns, replies, taken_ns

    def step(self) -> bool:
        self.send_all()
        if self.replies is None or (self.sent and self.sent[0][0] <= self.replies[0]):
            return super().step()
        (self.now_ns, replies, taken_ns), self.replies = self.replies, None
        if self.drafts is not None:
            self.drafts.drafted(replies, taken_ns, self.scheduler.by_key)
        return True


@dataclass
class AnyLengths:
    """Replaces the choice of draft lengths that pay by random lengths; the draft model takes in all prompts."""

    source: random.Random
    most: int
    asked: int = field(default=0, init=False)

    def length(self, drafts: ModelDrafts, sequences: Sequence[object], most: dict[int, int], speed: float) -> int:
        self.asked += 1
        return self.source.randint(0, self.most) if most else 0


def wait_for_any(source: random.Random, most: int, monkeypatch: pytest.MonkeyPatch) -> AnyLengths:
    lengths = AnyLengths(source, most)
    monkeypatch.setattr(ModelDrafts, "length", lambda self, *given: lengths.length(self, *given))
    worth = lambda self, sequence: self._lacking(sequence) > 8 and sequence.key not in self._without_room  # noqa: E731
    monkeypatch.setattr(ModelDrafts, "_is_worth", worth)
    return lengths
