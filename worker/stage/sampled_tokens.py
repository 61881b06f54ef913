"""Tokens that microbatches of an epoch have sampled: for chunks that were sent before their token was known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter_ns

from llamaclust.core.errors import ProtocolError, WorkerError
from llamaclust.core.limits import MAX_BATCH_TOKENS, MAX_VOCABULARY
from llamaclust.core.sampling import RowResult, RowTask, SampleTask
from llamaclust.kernels import _native
from llamaclust.wire.microbatch.codec import MAX_STAGES, decode_sampled_tokens
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SampledTokens, SamplingInputs

MOST_IN_FLIGHT = 2 * MAX_STAGES + 4  # microbatches: no coordinator has more


def sampled_tokens_of(number: int, rows: tuple[RowResult, ...]) -> SampledTokens:
    """Of a result; a row without an answer counts as token 0, and what follows it is thrown away."""
    return SampledTokens(number, tuple(max(row.token, 0) for row in rows))


def read_sampled_tokens(data: bytes) -> SampledTokens:
    """Natively where they have their usual form. ProtocolError for bytes that are not sampled tokens."""
    read = _native.read_sampled_tokens(data, MAX_BATCH_TOKENS, MAX_VOCABULARY)
    return decode_sampled_tokens(data) if read is None else SampledTokens(read[0], tuple(read[1]))


def newest_dependency(microbatch: Microbatch) -> int | None:
    """The last microbatch that it follows; None where it follows none."""
    return max((chunk.depends_on[0] for chunk in microbatch.chunks if chunk.depends_on), default=None)


def needs_tokens(inputs: SamplingInputs) -> bool:
    """Whether tokens of the microbatch itself add something to them."""
    return any(isinstance(task, SampleTask) and (task.history_rows or task.matcher) for task in inputs.tasks)


class SampledTokensBox:
    """The tokens of one epoch's last microbatches."""

    def __init__(self) -> None:
        self._tokens: dict[int, tuple[tuple[int, ...], int]] = {}  # (tokens, perf_counter_ns) by ascending number

    def __contains__(self, number: object) -> bool:
        return number in self._tokens

    def put(self, sampled: SampledTokens) -> None:
        """ProtocolError for one out of turn."""
        newest = next(reversed(self._tokens), -1)
        if sampled.number <= newest:
            raise ProtocolError(f"tokens of microbatch {sampled.number} after those of {newest}")
        self._tokens[sampled.number] = sampled.tokens, perf_counter_ns()
        if len(self._tokens) > MOST_IN_FLIGHT:
            del self._tokens[next(iter(self._tokens))]

    def came_ns(self, number: int | None) -> int:
        """When the tokens of that microbatch came (perf_counter_ns); 0 where they did not."""
        return self._tokens[number][1] if number in self._tokens else 0

    def of(self, number: int) -> tuple[int, ...]:
        """The tokens of that microbatch; none where they are not known."""
        return self._tokens[number][0] if number in self._tokens else ()

    def all_of(self, numbers: Sequence[int]) -> list[SampledTokens]:
        """The tokens of these microbatches. WorkerError where those of one are not known."""
        if unknown := [number for number in numbers if number not in self._tokens]:
            raise WorkerError(f"the tokens of microbatch {unknown[0]} are not known")
        return [SampledTokens(number, self._tokens[number][0]) for number in numbers]

    def fill(self, microbatch: Microbatch) -> Microbatch:
        """The microbatch with the tokens it follows. WorkerError where one is not known."""
        if newest_dependency(microbatch) is None:
            return microbatch
        return replace(microbatch, chunks=tuple(map(self._filled, microbatch.chunks)))

    def fill_frame(self, frame: _native.MicrobatchFrame) -> bool:
        """Likewise a frame that was read natively; whether all of its tokens are known now."""
        return all(frame.fill(number, self.of(number)) for number in frame.depends_on)

    def fill_inputs(self, inputs: SamplingInputs, microbatch: Microbatch) -> SamplingInputs:
        """The sampling inputs of a microbatch with what its own tokens add to them: histories go on with these, and
        matchers take a drafted row in if its token was chosen before it."""
        if not needs_tokens(inputs):
            return inputs
        rows = [(chunk, row) for chunk in microbatch.chunks for row in _output_rows(chunk)]
        if len(rows) != len(inputs.tasks):
            return inputs  # the sampler reports it
        filled = {id(chunk): self._filled(chunk) for chunk in microbatch.chunks}
        tasks: list[RowTask] = []
        before: Chunk | None = None  # whose row was sampled before
        for (chunk, row), task in zip(rows, inputs.tasks, strict=True):
            if isinstance(task, SampleTask):
                task = _completed(task, filled[id(chunk)].tokens[: row + 1], is_drafted=chunk is before)
                before = chunk
            tasks.append(task)
        return replace(inputs, tasks=tuple(tasks))

    def _filled(self, chunk: Chunk) -> Chunk:
        if chunk.depends_on is None:
            return chunk
        return replace(chunk, tokens=(self._token(*chunk.depends_on),), depends_on=None)

    def _token(self, number: int, row: int) -> int:
        tokens = self.of(number)
        if row >= len(tokens):
            raise WorkerError(f"row {row} of microbatch {number} has no token to follow: {len(tokens)} are known")
        return tokens[row]


def _output_rows(chunk: Chunk) -> range:
    return range(len(chunk.tokens) - chunk.outputs, len(chunk.tokens))


def _completed(task: SampleTask, tokens: tuple[int, ...], *, is_drafted: bool) -> SampleTask:
    """With the tokens of its chunk up to its row."""
    if task.history_rows > len(tokens):
        raise ProtocolError(
            f"a history that goes on with {task.history_rows} tokens of a chunk, at its row {len(tokens)}"
        )
    history = task.history
    if task.history_rows:
        most = max(task.penalty_window or 0, task.dry_window or 0)
        history = (*history, *tokens[-task.history_rows :])[-most:]
    matcher = task.matcher
    if matcher is not None and is_drafted:
        matcher = replace(matcher, drafted=tokens[-1])
    return replace(task, history=history, history_rows=0, matcher=matcher)
