"""Tokens that microbatches of an epoch have sampled: for chunks that were sent before their token was known."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import perf_counter_ns

from llamaclust.core.errors import ProtocolError, WorkerError
from llamaclust.core.sampling import RowResult, RowTask, SampleTask
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SampledTokens, SamplingInputs
from llamaclust.wire.rpc.deadlines import deadline

_MOST_KEPT = 256
"""More microbatches than any coordinator has in flight."""


def sampled_tokens_of(number: int, rows: tuple[RowResult, ...]) -> SampledTokens:
    """Of a result; a row without an answer counts as token 0, and what follows it is thrown away."""
    return SampledTokens(number, tuple(max(row.token, 0) for row in rows))


def _newest(microbatch: Microbatch) -> int:
    """The last microbatch that it follows; -1 where it follows none."""
    return max((chunk.depends_on[0] for chunk in microbatch.chunks if chunk.depends_on), default=-1)


class SampledTokensBox:
    """The tokens of one epoch's last microbatches. One microbatch waits at a time, in number order."""

    def __init__(self) -> None:
        self._tokens: dict[int, tuple[int, ...]] = {}  # by number, ascending
        self._came_ns: dict[int, int] = {}
        self._came = asyncio.Event()
        self._broken: WorkerError | None = None

    def put(self, sampled: SampledTokens) -> None:
        """ProtocolError for one out of turn."""
        if self._tokens and sampled.number <= next(reversed(self._tokens)):
            raise ProtocolError(f"tokens of microbatch {sampled.number} after those of {next(reversed(self._tokens))}")
        self._tokens[sampled.number] = sampled.tokens
        self._came_ns[sampled.number] = perf_counter_ns()
        if len(self._tokens) > _MOST_KEPT:
            oldest = next(iter(self._tokens))
            del self._tokens[oldest], self._came_ns[oldest]
        self._came.set()

    def fail(self, error: WorkerError) -> None:
        """No more will come."""
        self._broken = error
        self._came.set()

    def came_ns(self, microbatch: Microbatch) -> int:
        """When the last token came that the microbatch follows (perf_counter_ns); 0 where there is none."""
        return self._came_ns.get(_newest(microbatch), 0)

    async def known(self, microbatch: Microbatch, deadline_s: float) -> None:
        """Returns when every token that the microbatch follows is there. DeadlineError where one does not come."""
        newest = _newest(microbatch)
        if newest < 0 or newest in self._tokens:
            return
        async with deadline(f"the tokens of microbatch {newest}", deadline_s):
            while newest not in self._tokens:
                if self._broken is not None:
                    raise WorkerError(str(self._broken))
                self._came.clear()
                await self._came.wait()

    def fill(self, microbatch: Microbatch) -> Microbatch:
        """The microbatch with the tokens it follows. WorkerError where one is not known."""
        if not any(chunk.depends_on for chunk in microbatch.chunks):
            return microbatch
        return replace(microbatch, chunks=tuple(map(self._filled, microbatch.chunks)))

    def fill_inputs(self, inputs: SamplingInputs, microbatch: Microbatch) -> SamplingInputs:
        """The sampling inputs of a microbatch with the histories that go on with those tokens."""
        if not any(isinstance(task, SampleTask) and task.history_follows for task in inputs.tasks):
            return inputs
        chunks = [chunk for chunk in microbatch.chunks for _ in range(chunk.outputs)]
        if len(chunks) != len(inputs.tasks):
            return inputs  # the sampler reports it
        return replace(inputs, tasks=tuple(map(self._with_history, inputs.tasks, chunks)))

    def _with_history(self, task: RowTask, chunk: Chunk) -> RowTask:
        if not (isinstance(task, SampleTask) and task.history_follows):
            return task
        if chunk.depends_on is None:
            raise ProtocolError("a history that goes on with a sampled token, in a chunk that follows none")
        return replace(task, history=(*task.history, self._token(*chunk.depends_on)), history_follows=False)

    def _filled(self, chunk: Chunk) -> Chunk:
        return (
            chunk
            if chunk.depends_on is None
            else replace(chunk, tokens=(self._token(*chunk.depends_on),), depends_on=None)
        )

    def _token(self, number: int, row: int) -> int:
        tokens = self._tokens.get(number, ())
        if row >= len(tokens):
            raise WorkerError(f"row {row} of microbatch {number} has no token to follow: {len(tokens)} are known")
        return tokens[row]
