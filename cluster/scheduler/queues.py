"""Owns running and waiting sequences. A sequence starts when KV memory has room. A preempted sequence waits again."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from functools import partial
from operator import attrgetter

from llamaclust.cluster.scheduler.kv.memory import RESERVE_BLOCKS, KvMemory
from llamaclust.cluster.scheduler.sequence_choice import (
    RunningCounts,
    first_in_turn,
    in_turn,
    preemption_victim,
    startable,
    takes_turn,
    turn_victims,
)
from llamaclust.cluster.scheduler.sequences import Phase, Sequence
from llamaclust.core.errors import QueueFullError
from llamaclust.core.sharing.shares import largest_share

_OVERTAKING = 8

_MAX_OVERTAKEN = 32

_PREFILL, _DECODE = Phase.PREFILL, Phase.DECODE
_by_arrival = attrgetter("key")


def _rank(running: RunningCounts, sequence: Sequence) -> tuple[int, int, int]:
    return *running.rank(sequence), sequence.remaining


class SequenceQueues:
    def __init__(self, memory: KvMemory, max_running: int) -> None:
        self.memory = memory
        self.max_running = max_running
        self.running: list[Sequence] = []  # Running sequences in order of arrival.
        self.waiting: deque[Sequence] = deque()
        self.restoring: list[Sequence] = []  # Sequences that wait until their KV blocks are read from disk.
        # Waiting sequences that are longer than KV memory, which became smaller. They wait for `restart`.
        self.too_long: list[Sequence] = []
        # Running sequences with slow matchers that must skip the next microbatch.
        self.held: frozenset[Sequence] = frozenset()
        self.released: list[int] = []  # Keys of sequences whose matchers the last stage can drop.
        self._denied: object = None  # Situation in which preemptions would not give the next sequence enough memory.
        self.preemptions = 0
        self.cached_tokens = 0  # Total prompt tokens found in the prefix cache.

    @property
    def decoding(self) -> int:
        held = sum(sequence.phase is _DECODE for sequence in self.held)
        return sum([sequence.phase is _DECODE for sequence in self.running]) - held

    @property
    def decode_plainly(self) -> bool:
        return all(sequence.phase is _DECODE and sequence.sampler.is_plain for sequence in self.running)

    @property
    def prefilling(self) -> list[Sequence]:
        prefilling = [sequence for sequence in self.running if sequence.phase is _PREFILL and sequence.remaining]
        return [sequence for sequence in prefilling if sequence not in self.held]

    @property
    def awaiting_decode(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.awaits_decode and sequence not in self.held]

    @property
    def are_settled(self) -> bool:
        return not self.waiting and not any(
            (s.awaits_decode or s.phase is _PREFILL) and s not in self.held for s in self.running
        )

    @property
    def can_start(self) -> bool:
        return bool(self.waiting) and len(self.running) < self.max_running

    def restart(self, memory: KvMemory, max_running: int, sequences: Iterable[Sequence]) -> None:
        self.memory = memory
        self.max_running = max_running
        self.running.clear()
        self.waiting.clear()
        self.restoring.clear()
        self.too_long.clear()
        self.released.clear()
        self.take(sequences)

    def take(self, sequences: Iterable[Sequence]) -> None:
        """Queues sequences that another scheduler or pipeline had, in order of arrival."""
        for sequence in sequences:
            sequence.restart()
            (self.waiting if self.memory.can_hold(sequence) else self.too_long).append(sequence)
        self.waiting = deque(sorted(self.waiting, key=_by_arrival))

    def check_room(self, owner: str, most_waiting: int, more: int = 1) -> None:
        """Raises QueueFullError if `more` waiting sequences of the owner are too many. The limit falls when other
        owners wait, and rises by the number of sequences that can start at once."""
        waiting = [*self.waiting, *self.restoring, *self.too_long]
        own, free = sum([other.request.owner == owner for other in waiting]), self.max_running - len(self.running)
        limit = largest_share(own, len(waiting), most_waiting + free)
        if own + more > limit:
            raise QueueFullError(
                f"{own} sequences of this API key or client address wait, and {more} more are too many: max_waiting is "
                f"{most_waiting}, {free} more can run, and other clients have {len(waiting) - own}: try again later"
            )

    def add(self, sequence: Sequence, most_waiting: int) -> None:
        self.check_room(sequence.request.owner, most_waiting)
        self.waiting.append(sequence)

    def admit(self) -> Sequence | None:
        if not self.can_start or not (waiting := startable(self.waiting, self.running)):
            return None
        running = RunningCounts.of(self.running)
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
        if sequence.in_flight or not self.memory.admit(sequence, RESERVE_BLOCKS * len(self.running)):
            return False
        self._start(sequence)
        return True

    def give_turn(self) -> None:
        """Preempts a running sequence if the next waiting sequence should run in its place, has no room, and gets
        enough room by preemption. Must not be called while a microbatch is being made."""
        if not self.waiting or not (waiting := startable(self.waiting, self.running)):
            return
        running = RunningCounts.of(self.running)
        first = first_in_turn(waiting, running)
        if first.in_flight or not takes_turn(first, self.running, running):
            return
        count = len(self.running)
        lacks_blocks = self.memory.lacks_blocks(first, RESERVE_BLOCKS * count)
        if count < self.max_running and not lacks_blocks:
            return
        situation = first.key, [other.key for other in self.running], self.memory.room_with(self.running, first)
        if situation == self._denied:
            return
        victims = turn_victims(first, self.running, running)
        if self.memory.suffices_without(victims, first, RESERVE_BLOCKS * (count - len(victims))):
            self.preempt(victims[0])
        else:
            self._denied = situation

    def make_room(self, sequence: Sequence) -> None:
        """Starts the sequence or gives it more blocks. May preempt others. Requires that no microbatch is in flight."""
        grow = self.memory.grow if sequence.phase is _DECODE else self.memory.extend
        if sequence.is_running and not grow(sequence):
            self.preempt(sequence)
        if sequence.is_running:
            return
        while len(self.running) >= self.max_running or not self.memory.admit(sequence, 0):
            self._preempt_one()
        self._start(sequence)

    def shortest(self, prefilling: list[Sequence]) -> Sequence | None:
        """Returns a short sequence to prefill before the oldest one, or None. Starts it if it is waiting."""
        if not prefilling:
            return None
        running = RunningCounts.of(self.running)
        if self.can_start and (startables := startable(self.waiting, self.running)):
            waiting = min(startables, key=partial(_rank, running))
            started = partial(_rank, running.with_another(waiting))
            is_shortest = min((*prefilling, waiting), key=started) is waiting
            if is_shortest and (begun := self._overtake(waiting, first_in_turn(startables, running))) is not None:
                return begun
        shortest = min(prefilling, key=partial(_rank, running))
        return None if shortest is prefilling[0] else shortest

    def _overtake(self, sequence: Sequence, first: Sequence) -> Sequence | None:
        """Starts `sequence` if `first`, the next in turn, would also fit. Otherwise starts `first` if possible."""
        running = len(self.running)
        if sequence is not first and (
            running + 2 > self.max_running
            or not self.memory.has_room_for((sequence, first), RESERVE_BLOCKS * (running + 1))
        ):
            sequence = first
        return sequence if self._admit(sequence) else None

    def grow(self, sequence: Sequence) -> None:
        while sequence.phase is _DECODE and not self.memory.grow(sequence):
            if self.memory.can_hold(sequence):
                self._preempt_one()
            else:
                self.preempt(sequence)

    def extend(self, sequence: Sequence) -> None:
        while sequence.phase is _PREFILL and not self.memory.extend(sequence):
            self._preempt_one()

    def take_released(self) -> tuple[int, ...]:
        released = tuple(self.released)
        self.released.clear()
        return released

    def begin_restore(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.restoring.append(sequence)

    def end_restore(self, sequence: Sequence) -> None:
        if sequence in self.restoring:
            self.restoring.remove(sequence)
            place = next((i for i, other in enumerate(self.waiting) if other.key > sequence.key), len(self.waiting))
            self.waiting.insert(place, sequence)

    def put_back(self, sequence: Sequence, phase: Phase = Phase.WAITING) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.phase = phase
        if self.memory.can_hold(sequence):
            self.waiting.appendleft(sequence)
        else:
            self.too_long.append(sequence)

    def recompute(self, sequence: Sequence) -> None:
        if sequence.is_running:
            self.running.remove(sequence)
            self.memory.release(sequence)
            sequence.phase = Phase.WAITING
            self.waiting.appendleft(sequence)

    def _preempt_one(self) -> None:
        self.preempt(preemption_victim(self.running, RunningCounts.of(self.running)))

    def preempt(self, sequence: Sequence) -> None:
        self.put_back(sequence)
        self.preemptions += 1

    def discard(self, sequence: Sequence) -> None:
        sequence.outputs.repeat()
        self.memory.invalidate(sequence)
        if sequence.is_running:
            self.put_back(sequence, Phase.DISCARDED)
        sequence.phase = Phase.DISCARDED

    def remove(self, sequence: Sequence) -> None:
        if sequence.is_running:
            self.running.remove(sequence)
        elif sequence in self.restoring:
            self.restoring.remove(sequence)
        elif sequence in self.too_long:
            self.too_long.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.phase = Phase.FINISHED
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        # Microbatches in flight may still read the blocks, but stages run later microbatches after them.
        self.memory.release(sequence)
        self._release_matcher(sequence)

    def _release_matcher(self, sequence: Sequence) -> None:
        if sequence.matcher.is_started:
            sequence.matcher.release()
            self.released.append(sequence.key)

    def _start(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        sequence.phase = Phase.PREFILL
        if not sequence.is_begun:
            sequence.usage.cached_tokens = sequence.scheduled
            self.cached_tokens += sequence.scheduled
        insort(self.running, sequence, key=_by_arrival)
        held = [other for other in (*self.restoring, *self.waiting) if other.matcher.is_started]
        if held and len(self.running) + len(held) > self.max_running:
            self._release_matcher(held[-1])  # The last stage takes at most `max_running` matchers.
