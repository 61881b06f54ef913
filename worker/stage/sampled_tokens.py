"""The sampled tokens of an epoch's microbatches, for chunks that were sent before their token was known."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns

from llamaclust.core.errors import ProtocolError, WorkerError
from llamaclust.core.limits import MAX_BATCH_TOKENS
from llamaclust.core.sampling_bounds import MAX_VOCABULARY
from llamaclust.kernels import _native
from llamaclust.wire.microbatch.codec import MAX_STAGES
from llamaclust.wire.microbatch.messages import SampledTokens

MOST_IN_FLIGHT = 2 * MAX_STAGES + 4  # microbatches: no coordinator has more


def read_sampled_tokens(data: bytes) -> SampledTokens:
    number, tokens = _native.read_sampled_tokens(data, MAX_BATCH_TOKENS, MAX_VOCABULARY)
    return SampledTokens(number, tuple(tokens))


class SampledTokensBox:
    def __init__(self) -> None:
        self._tokens: dict[int, tuple[tuple[int, ...], int]] = {}  # (tokens, perf_counter_ns) by ascending number

    def __contains__(self, number: object) -> bool:
        return number in self._tokens

    def put(self, sampled: SampledTokens) -> None:
        newest = next(reversed(self._tokens), -1)
        if sampled.number <= newest:
            raise ProtocolError(f"tokens of microbatch {sampled.number} came after those of {newest}")
        self._tokens[sampled.number] = sampled.tokens, perf_counter_ns()
        if len(self._tokens) > MOST_IN_FLIGHT:
            del self._tokens[next(iter(self._tokens))]

    def came_ns(self, number: int | None) -> int:
        """Returns the perf_counter_ns time at which a microbatch's tokens came, or 0 if they have not come."""
        return self._tokens[number][1] if number in self._tokens else 0

    def all_of(self, numbers: Sequence[int]) -> list[SampledTokens]:
        if unknown := [number for number in numbers if number not in self._tokens]:
            raise WorkerError(f"the tokens of microbatch {unknown[0]} are not known")
        return [SampledTokens(number, self._tokens[number][0]) for number in numbers]

    def fill(self, frame: _native.MicrobatchFrame) -> None:
        """Fills in the tokens that the frame depends on. Raises WorkerError if one is unknown."""
        for number in frame.depends_on:
            tokens = self._tokens[number][0] if number in self._tokens else ()
            if not frame.fill(number, tokens):
                row = max(row for followed, row in frame.dependencies if followed == number)
                raise WorkerError(f"row {row} of microbatch {number} has no token to follow: {len(tokens)} are known")
