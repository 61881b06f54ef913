"""Fills sampled tokens into microbatches and sampling inputs that depend on them."""

from __future__ import annotations

from dataclasses import replace

from llamaclust.core.errors import ProtocolError, WorkerError
from llamaclust.core.sampler.results import RowResult
from llamaclust.core.sampler.tasks import RowTask, SampleTask
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SampledTokens, SamplingInputs
from llamaclust.worker.stage.dependencies import SampledTokensBox


def sampled_tokens_of(number: int, rows: tuple[RowResult, ...]) -> SampledTokens:
    """Returns a result's tokens; a row without an answer counts as token 0, since its continuation is discarded."""
    return SampledTokens(number, tuple(max(row.token, 0) for row in rows))


class PlainTokensBox(SampledTokensBox):
    """A box that fills messages instead of frames."""

    def filled(self, microbatch: Microbatch) -> Microbatch:
        """Returns the microbatch with the tokens that it depends on; raises WorkerError if one is not known."""
        return replace(microbatch, chunks=tuple(map(self._filled, microbatch.chunks)))

    def fill_inputs(self, inputs: SamplingInputs, microbatch: Microbatch) -> SamplingInputs:
        """Returns the sampling inputs of a microbatch, completed with its tokens: histories get them, and the matcher
        of a drafted row gets the drafted token."""
        rows = [(chunk, row) for chunk in microbatch.chunks for row in _output_rows(chunk)]
        if len(rows) != len(inputs.tasks):
            return inputs  # the sampler reports it
        filled = {id(chunk): self._filled(chunk) for chunk in microbatch.chunks}
        tasks: list[RowTask] = []
        before: Chunk | None = None  # the chunk of the previous sampled row
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
        tokens = self._came[number][0].tokens if number in self else ()
        if row >= len(tokens):
            raise WorkerError(f"microbatch {number} sampled no token for row {row}: it sampled {len(tokens)} tokens")
        return tokens[row]


def _output_rows(chunk: Chunk) -> range:
    return range(len(chunk.tokens) - chunk.outputs, len(chunk.tokens))


def _completed(task: SampleTask, tokens: tuple[int, ...], *, is_drafted: bool) -> SampleTask:
    """Completes a task with the tokens of its chunk up to its row."""
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
