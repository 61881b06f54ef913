"""Which sequences run and which wait, by turns and arrival, and the KV memory that moves them between both."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from functools import partial
from operator import attrgetter

from llamaclust.cluster.scheduler.kv.memory import RESERVE_BLOCKS, KvMemory
from llamaclust.cluster.scheduler.sequences import Phase, Sequence
from llamaclust.cluster.scheduler.turns import Running, first_in_turn, gives_way, in_turn, startable, takes_turn
from llamaclust.core.errors import QueueFullError
from llamaclust.core.sharing.shares import fits

_OVERTAKING = 8
"""Sequences that are tried where the one whose turn it is does not fit."""

_MAX_OVERTAKEN = 32
"""Sequences that start before it; then it is the next one, however long it has to wait for memory."""

_PREFILL, _DECODE = Phase.PREFILL, Phase.DECODE
_by_arrival = attrgetter("key")


def _rank(running: Running, sequence: Sequence) -> tuple[int, int, int]:
    """For `SequenceQueues.shortest`."""
    return *running.rank(sequence), sequence.remaining


class SequenceQueues:
    """The sequences of one scheduler that are not finished. `memory` is replaced with the pipeline."""

    def __init__(self, memory: KvMemory, max_running: int) -> None:
        self.memory = memory
        self.max_running = max_running
        self.running: list[Sequence] = []  # by arrival
        self.waiting: deque[Sequence] = deque()
        self.restoring: list[Sequence] = []  # wait for KV memory from disk
        self.held: frozenset[Sequence] = frozenset()  # of those that run: slow matchers whose turn comes later
        self.released: list[int] = []  # keys of sequences whose matchers the last stage may forget
        self.preemptions = 0
        self.cached_tokens = 0  # prompt tokens found in the prefix cache, in all

    @property
    def decoding(self) -> int:
        """Returns the number of sequences that decode and are not held."""
        held = sum(sequence.phase is _DECODE for sequence in self.held)
        return sum([sequence.phase is _DECODE for sequence in self.running]) - held

    @property
    def decode_plainly(self) -> bool:
        """Whether none awaits its first token, or needs others to choose one: steps ahead have rows of all."""
        return all(sequence.phase is _DECODE and sequence.sampler.is_plain for sequence in self.running)

    @property
    def prefilling(self) -> list[Sequence]:
        prefilling = [sequence for sequence in self.running if sequence.phase is _PREFILL and sequence.remaining]
        return [sequence for sequence in prefilling if sequence not in self.held]

    @property
    def awaiting_decode(self) -> list[Sequence]:
        """Those whose last token may be computed now."""
        return [sequence for sequence in self.running if sequence.awaits_decode and sequence not in self.held]

    @property
    def are_settled(self) -> bool:
        """True if no sequence waits, and all known rows of those that run are under way or held."""
        return not self.waiting and not any(
            (s.awaits_decode or s.phase is _PREFILL) and s not in self.held for s in self.running
        )

    @property
    def can_start(self) -> bool:
        """Whether a sequence waits and there is a place for it, KV memory apart."""
        return bool(self.waiting) and len(self.running) < self.max_running

    def restart(self, memory: KvMemory, max_running: int, sequences: Iterable[Sequence]) -> None:
        """All sequences wait, with nothing computed."""
        self.memory = memory
        self.max_running = max_running
        self.running.clear()
        self.waiting = deque(sequences)
        self.restoring.clear()
        self.released.clear()
        for sequence in self.waiting:
            sequence.restart()

    def add(self, sequence: Sequence, most_waiting: int) -> None:
        """It waits. QueueFullError where its owner has so many that wait, beyond those that start at once, or less
        where others have many."""
        waiting = [*self.waiting, *self.restoring]
        own = sum([other.request.owner == sequence.request.owner for other in waiting])
        if not fits(own, len(waiting), most_waiting + self.max_running - len(self.running)):
            raise QueueFullError(f"{own} requests wait already, more may not: try again later")
        self.waiting.append(sequence)

    def admit(self) -> Sequence | None:
        """Starts the sequence whose turn it is, with blocks for all of its tokens, or the next one that fits where it
        does not; None where all have to wait on."""
        if not self.can_start or not (waiting := startable(self.waiting, self.running)):
            return None
        running = Running.of(self.running)
        first, *others = in_turn(waiting, running, 1 + _OVERTAKING)
        if self._admit(first):
            return first
        if first.overtaken == _MAX_OVERTAKEN or first.is_begun or takes_turn(first, self.running, running):
            return None
        admitted = next((sequence for sequence in others if self._admit(sequence)), None)
        if admitted is not None:
            first.overtaken += 1
        return admitted

    def _admit(self, sequence: Sequence) -> bool:
        """Microbatches in flight of a preempted one are awaited: their result may be one more token."""
        if sequence.in_flight or not self.memory.admit(sequence, RESERVE_BLOCKS * len(self.running)):
            return False
        self._start(sequence)
        return True

    def give_turn(self) -> None:
        """Where a request has nothing that runs, and no place or memory for it, the one with the most of them gives up
        its youngest. Not while a microbatch is being made."""
        if not self.waiting or not (waiting := startable(self.waiting, self.running)):
            return
        running = Running.of(self.running)
        first = first_in_turn(waiting, running)
        if first.in_flight or not takes_turn(first, self.running, running):
            return
        if len(self.running) < self.max_running and not self.memory.lacks_blocks(first):
            return
        self._preempt_one()

    def make_room(self, sequence: Sequence) -> None:
        """Starts a sequence, or gives it the block it needs, by preempting others; none has anything in flight."""
        grow = self.memory.grow if sequence.phase is _DECODE else self.memory.extend
        if sequence.is_running and not grow(sequence):
            self.preempt(sequence)
        if sequence.is_running:
            return
        while len(self.running) >= self.max_running or not self.memory.admit(sequence, 0):
            self._preempt_one()
        self._start(sequence)

    def shortest(self, prefilling: list[Sequence]) -> Sequence | None:
        """The sequence whose request has less that runs than the oldest one's, or else with less left to do; None where
        there is none. One that waited is started for it."""
        if not prefilling:
            return None
        running = Running.of(self.running)
        if self.can_start and (startables := startable(self.waiting, self.running)):
            waiting = min(startables, key=partial(_rank, running))
            started = partial(_rank, running.with_another(waiting))
            is_shortest = min((*prefilling, waiting), key=started) is waiting
            if is_shortest and self._overtake(waiting, first_in_turn(startables, running)):
                return waiting
        shortest = min(prefilling, key=partial(_rank, running))
        return None if shortest is prefilling[0] else shortest

    def _overtake(self, sequence: Sequence, first: Sequence) -> bool:
        """Starts it if it is the first in turn, or leaves a place and memory for that one."""
        running = len(self.running)
        if sequence is not first and (
            running + 2 > self.max_running
            or not self.memory.has_room_for((sequence, first), RESERVE_BLOCKS * (running + 1))
        ):
            return False
        return self._admit(sequence)

    def grow(self, sequence: Sequence) -> None:
        """Gives a sequence the block it needs by preempting others or itself, see `gives_way`."""
        while sequence.phase is _DECODE and not self.memory.grow(sequence):
            self._preempt_one()

    def extend(self, sequence: Sequence) -> None:
        """Likewise the blocks for tokens that its grammar has forced."""
        while sequence.phase is _PREFILL and not self.memory.extend(sequence):
            self._preempt_one()

    def take_released(self) -> tuple[int, ...]:
        """The keys that were released since the last call."""
        released = tuple(self.released)
        self.released.clear()
        return released

    def begin_restore(self, sequence: Sequence) -> None:
        """A sequence that waits is not started until `end_restore`."""
        self.waiting.remove(sequence)
        self.restoring.append(sequence)

    def end_restore(self, sequence: Sequence) -> None:
        """It waits in its place again, unless it has ended meanwhile."""
        if sequence in self.restoring:
            self.restoring.remove(sequence)
            place = next((i for i, other in enumerate(self.waiting) if other.key > sequence.key), len(self.waiting))
            self.waiting.insert(place, sequence)

    def put_back(self, sequence: Sequence, phase: Phase = Phase.WAITING) -> None:
        """To the front of the queue; its tokens are computed again later, with the same result."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.phase = phase
        self.waiting.appendleft(sequence)

    def recompute(self, sequence: Sequence) -> None:
        """Likewise where its last row is needed again, and other rows with it: its matcher stays."""
        if sequence.is_running:
            self.running.remove(sequence)
            self.memory.release(sequence)
            sequence.phase = Phase.WAITING
            self.waiting.appendleft(sequence)

    def _preempt_one(self) -> None:
        self.preempt(gives_way(self.running, Running.of(self.running)))

    def preempt(self, sequence: Sequence) -> None:
        self.put_back(sequence)
        self.preemptions += 1

    def discard(self, sequence: Sequence) -> None:
        """Repeats a sequence's computation from its tokens, in blocks that no other sequence has written, in case that
        a stage's result or KV memory is damaged."""
        sequence.outputs.repeat()
        self.memory.invalidate(sequence)
        if sequence.is_running:
            self.put_back(sequence, Phase.DISCARDED)
        sequence.phase = Phase.DISCARDED

    def remove(self, sequence: Sequence) -> None:
        """Frees what a finished sequence holds."""
        if sequence.is_running:
            self.running.remove(sequence)
        elif sequence in self.restoring:
            self.restoring.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.phase = Phase.FINISHED
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.memory.release(sequence)
        if sequence.matcher.is_started:
            sequence.matcher.is_started = False
            self.released.append(sequence.key)

    def _start(self, sequence: Sequence) -> None:
        """A sequence that waits runs; it has its blocks."""
        self.waiting.remove(sequence)
        sequence.phase = Phase.PREFILL
        if not sequence.is_begun:
            sequence.usage.cached_tokens = sequence.scheduled
            self.cached_tokens += sequence.scheduled
        insort(self.running, sequence, key=_by_arrival)
