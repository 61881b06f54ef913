"""Microbatch inputs from other streams: sampling inputs for the last stage, and sampled tokens for the first."""

from __future__ import annotations

import asyncio
from collections.abc import Container

from llamaclust.core.epochs import place_text
from llamaclust.core.errors import LlamaclustError, ProtocolError
from llamaclust.wire.microbatch.messages import SampledTokens
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.worker.stage.sampled_tokens import MOST_IN_FLIGHT, SampledTokensBox
from llamaclust.worker.stage.step_inputs import StepInputs

_TOKENS_S = 600.0
"""The longest time in seconds that a microbatch waits for tokens. A coordinator without a result gives up earlier."""


class Dependencies:
    """One epoch's dependencies. One microbatch waits at a time, in number order."""

    def __init__(self, epoch: int, inputs_s: float) -> None:
        self.tokens = SampledTokensBox()
        self._epoch = epoch
        self._inputs_s = inputs_s
        self._inputs: dict[int, StepInputs] = {}
        self._next_put = self._next_done = 0
        self._came = asyncio.Event()
        self._broken: LlamaclustError | None = None
        self.awaits_tokens = False

    def put_inputs(self, inputs: StepInputs) -> None:
        """Raises ProtocolError if inputs are out of order or too many. Drops inputs of a finished microbatch."""
        found, expected = (inputs.tasks.epoch, inputs.tasks.number), (self._epoch, self._next_put)
        if found != expected:
            raise ProtocolError(f"sampling inputs: expected {place_text(expected)}, found {place_text(found)}")
        if len(self._inputs) >= MOST_IN_FLIGHT:
            raise ProtocolError(
                f"this stage got sampling inputs for more than {MOST_IN_FLIGHT} microbatches that have not arrived"
            )
        self._next_put += 1
        if found[1] >= self._next_done:
            self._inputs[found[1]] = inputs
            self._came.set()

    def put_tokens(self, sampled: SampledTokens) -> None:
        self.tokens.put(sampled)
        self._came.set()

    def fail(self, error: LlamaclustError) -> None:
        self._broken = error
        self._came.set()

    async def inputs(self, number: int) -> StepInputs:
        """Returns a microbatch's sampling inputs. Raises DeadlineError if they do not come, or the error of `fail`."""
        await self._wait("sampling inputs", number, self._inputs, self._inputs_s)
        return self._inputs[number]

    async def known(self, number: int | None) -> None:
        """Waits for a microbatch's tokens. Raises DeadlineError if they do not come, or the error of `fail`."""
        if number is not None and number not in self.tokens:
            self.awaits_tokens = True
            try:
                await self._wait("the tokens", number, self.tokens, _TOKENS_S)
            finally:
                self.awaits_tokens = False

    def done(self, number: int) -> None:
        self._inputs.pop(number, None)
        self._next_done = number + 1

    async def _wait(self, what: str, number: int, values: Container[int], deadline_s: float) -> None:
        if number in values:
            return
        async with deadline(f"{what} of microbatch {number}", deadline_s):
            while number not in values:
                if self._broken is not None:
                    raise type(self._broken)(str(self._broken))
                self._came.clear()
                await self._came.wait()
