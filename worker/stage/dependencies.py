"""Inputs of microbatches from other streams: sampling inputs for the last stage, and sampled tokens for the first."""

from __future__ import annotations

import asyncio
from collections.abc import Container
from time import perf_counter_ns

from llamaclust.core.epochs import place_text
from llamaclust.core.errors import LlamaclustError, ProtocolError, WorkerError
from llamaclust.core.limits import MAX_BATCH_TOKENS
from llamaclust.core.sampler.bounds import MAX_VOCABULARY
from llamaclust.kernels import _native
from llamaclust.wire.microbatch.codec import MAX_STAGES
from llamaclust.wire.microbatch.messages import SampledTokens
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.worker.stage.step_inputs import StepInputs

MOST_IN_FLIGHT = 2 * MAX_STAGES + 4  # Maximum number of microbatches in flight.
_TOKENS_S = 600.0
"""Maximum number of seconds that a microbatch waits for tokens. The coordinator gives up earlier."""


def read_sampled_tokens(data: bytes, vocabulary: int = MAX_VOCABULARY) -> SampledTokens:
    number, tokens = _native.read_sampled_tokens(data, MAX_BATCH_TOKENS, vocabulary)
    return SampledTokens(number, tuple(tokens))


class SampledTokensBox:
    def __init__(self) -> None:
        # (tokens, perf_counter_ns of their arrival), by ascending microbatch number.
        self._came: dict[int, tuple[SampledTokens, int]] = {}

    def __contains__(self, number: object) -> bool:
        return number in self._came

    def put(self, sampled: SampledTokens) -> None:
        newest = next(reversed(self._came), -1)
        if sampled.number <= newest:
            raise ProtocolError(f"tokens of microbatch {sampled.number} came after those of microbatch {newest}")
        self._came[sampled.number] = sampled, perf_counter_ns()
        if len(self._came) > MOST_IN_FLIGHT:
            del self._came[next(iter(self._came))]

    def came_ns(self, number: int | None) -> int:
        return self._came[number][1] if number in self._came else 0

    def fill(self, frame: _native.MicrobatchFrame) -> list[SampledTokens]:
        """Inserts sampled tokens into `frame`, and returns them. Raises WorkerError if a token is unknown."""
        followed = []
        for number in frame.depends_on:
            sampled = self._came[number][0] if number in self._came else SampledTokens(number, ())
            if not frame.fill(number, sampled.tokens):
                row = max(row for before, row in frame.dependencies if before == number)
                known = len(sampled.tokens)
                raise WorkerError(f"microbatch {number} sampled no token for row {row}: it sampled {known} tokens")
            followed.append(sampled)
        return followed


class Dependencies:
    """The inputs that one epoch's microbatches need from other streams. Only one microbatch waits at a time."""

    def __init__(self, epoch: int, inputs_s: float) -> None:
        self.tokens = SampledTokensBox()
        self.awaits_tokens = False
        self._epoch = epoch
        self._inputs_s = inputs_s
        self._inputs: dict[int, StepInputs] = {}
        self._next_put = self._next_done = 0
        self._came = asyncio.Event()
        self._broken: LlamaclustError | None = None

    def put_inputs(self, inputs: StepInputs) -> None:
        """Adds a microbatch's sampling inputs. Raises ProtocolError if they are out of order or too many."""
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
        """Returns a microbatch's sampling inputs. Raises DeadlineError, or the error that was passed to `fail`."""
        await self._wait("sampling inputs", number, self._inputs, self._inputs_s)
        return self._inputs[number]

    async def known(self, number: int | None) -> None:
        """Waits until microbatch `number` has sampled tokens. Raises DeadlineError, or the error passed to `fail`."""
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
