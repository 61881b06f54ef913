"""Sampling inputs that wait for their microbatch: put by the event loop, taken by the compute thread."""

from __future__ import annotations

import threading

from llamaclust.errors import DeadlineError, WireError
from llamaclust.wire.messages import SamplingInputs

_MOST_WAITING = 256


class InputsBox:
    """The inputs of one epoch, by number."""

    def __init__(self, epoch: int, deadline_s: float) -> None:
        self._epoch = epoch
        self._deadline_s = deadline_s
        self._waiting: dict[int, SamplingInputs] = {}
        self._unwanted: set[int] = set()
        self._next = 0
        self._changed = threading.Condition()

    def put(self, inputs: SamplingInputs) -> None:
        """WireError for inputs out of turn, or more than any coordinator has in flight."""
        if inputs.epoch != self._epoch or inputs.number != self._next:
            found = f"({inputs.epoch}, {inputs.number})"
            raise WireError(f"sampling inputs {found} where ({self._epoch}, {self._next}) was expected")
        if len(self._waiting) >= _MOST_WAITING:
            raise WireError(f"sampling inputs for more than {_MOST_WAITING} microbatches that did not come")
        with self._changed:
            self._next += 1
            if inputs.number in self._unwanted:
                self._unwanted.remove(inputs.number)
                return
            self._waiting[inputs.number] = inputs
            self._changed.notify()

    def take(self, number: int) -> SamplingInputs:
        """The inputs of microbatch `number`, which may still be on their way. DeadlineError where they do not come."""
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._waiting, self._deadline_s):
                raise DeadlineError(f"sampling inputs of microbatch {number}: not within {self._deadline_s:g} s")
            return self._waiting.pop(number)

    def discard(self, number: int) -> None:
        """Forgets the inputs of a microbatch that failed, be they here or on their way."""
        with self._changed:
            if number >= self._next:
                self._unwanted.add(number)
            self._waiting.pop(number, None)
