"""Sampling inputs that wait for their microbatch, or are waited for."""

from __future__ import annotations

import asyncio

from llamaclust.core.errors import ProtocolError
from llamaclust.wire.microbatch.messages import SamplingInputs
from llamaclust.wire.rpc.deadlines import deadline

_MOST_WAITING = 256


class SamplingInputsBox:
    """The inputs of one epoch, by number. One microbatch takes at a time, in number order."""

    def __init__(self, epoch: int, deadline_s: float) -> None:
        self._epoch = epoch
        self._deadline_s = deadline_s
        self._waiting: dict[int, SamplingInputs] = {}
        self._done = 0
        self._next = 0
        self._came = asyncio.Event()
        self._broken: ProtocolError | None = None

    def put(self, inputs: SamplingInputs) -> None:
        """ProtocolError for inputs out of turn, or more than any coordinator has in flight."""
        if inputs.epoch != self._epoch or inputs.number != self._next:
            found = f"({inputs.epoch}, {inputs.number})"
            raise ProtocolError(f"sampling inputs {found} where ({self._epoch}, {self._next}) was expected")
        if len(self._waiting) >= _MOST_WAITING:
            raise ProtocolError(f"sampling inputs for more than {_MOST_WAITING} microbatches that did not come")
        self._next += 1
        if inputs.number >= self._done:
            self._waiting[inputs.number] = inputs
            self._came.set()

    def fail(self, error: ProtocolError) -> None:
        """No more will come, since their stream broke the protocol."""
        self._broken = error
        self._came.set()

    async def take(self, number: int) -> SamplingInputs:
        """The inputs of microbatch `number`, which may still be on their way.

        DeadlineError where they do not come, ProtocolError where they cannot any more.
        """
        if number not in self._waiting:
            async with deadline(f"sampling inputs of microbatch {number}", self._deadline_s):
                while number not in self._waiting:
                    if self._broken is not None:
                        raise ProtocolError(str(self._broken))
                    self._came.clear()
                    await self._came.wait()
        return self._waiting[number]

    def done(self, number: int) -> None:
        """Forgets the inputs of microbatch `number`, be they here or on their way."""
        self._waiting.pop(number, None)
        self._done = number + 1
