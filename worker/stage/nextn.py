"""A multi-token prediction (MTP) head, which drafts after the last stage's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from llamaclust.core.limits import StageLimits
from llamaclust.kernels._native import MicrobatchFrame, RowOutcomes, SamplingTasks
from llamaclust.kernels.backend import Backend, Batch, Float32, Int32, Progress
from llamaclust.kernels.sampling import Sampler
from llamaclust.model.kv_type import KvType
from llamaclust.model.nextn.program import nextn_program
from llamaclust.model.program import KV_BLOCK_TOKENS, Program

if TYPE_CHECKING:
    from llamaclust.model.loader import Model

Normed = Callable[[Int32], Float32]
"""A function that returns normed hidden states [rows, embedding] of the given rows in the stage's last run."""


def nextn_program_of(model: Model, limits: StageLimits) -> Program:
    return nextn_program(model, KvType(limits.kv_type), limits.max_context_tokens)


def nextn_limits(limits: StageLimits) -> StageLimits:
    outputs = min(limits.max_outputs, limits.max_sequences)
    return replace(limits, max_outputs=outputs, window_blocks=0, state_blocks=0)


@dataclass(slots=True)
class _Taken:
    tables: Int32  # [blocks]
    end: int  # Number of positions in these blocks.
    first_row: int  # Index of the first row in the microbatch.
    position: int  # Position of the first row, and later of the row that drafts the next token.
    tokens: tuple[int, ...]  # The token after each row.
    output: int = -1  # Index of the result that chose the last token, or -1 if that token was not sampled.
    most: int = 0
    drafted: list[int] = field(default_factory=list)

    @property
    def has_room(self) -> bool:
        return len(self.drafted) < self.most and self.position < self.end


class NextnDrafter:
    def __init__(
        self, backend: Backend, model: Model, limits: StageLimits, sampler: Sampler, progress: Progress
    ) -> None:
        program = nextn_program_of(model, limits)
        self._stage = backend.load(program, model.tensors_for(program), nextn_limits(limits), progress)
        self._sampler = sampler
        self._most_tokens = limits.max_context_tokens
        self.weights = self._stage.weights
        self.kv_bytes, self.workspace_bytes = self._stage.kv_bytes, self._stage.workspace_bytes

    def draft(self, frame: MicrobatchFrame, normed: Normed, outcomes: RowOutcomes, tasks: SamplingTasks) -> None:
        """Computes the MTP head's keys and values, except for rejected drafts. Adds requested drafts to `outcomes`."""
        taken = _taken(frame, outcomes, tasks)
        for each in taken:
            each.end = min(each.end, self._most_tokens)
        if not taken:
            return
        drafting = [each for each in taken if each.most]
        places = np.concatenate([np.arange(each.first_row, each.first_row + len(each.tokens)) for each in taken])
        lines, logits = self._run(taken, normed(places.astype(np.int32)))
        for each in drafting:
            each.position += len(each.tokens) - 1
        self._choose(drafting, logits, tasks, 1)
        later = 2
        while further := [index for index, each in enumerate(drafting) if each.has_room]:
            hidden = self._stage.normed(lines[further])
            drafting = [drafting[index] for index in further]
            for each in drafting:
                each.tokens = (each.drafted[-1],)
            lines, logits = self._run(drafting, hidden)
            self._choose(drafting, logits, tasks, later)
            later += 1
        for each in taken:
            if each.drafted:
                outcomes.set_drafted(each.output, each.drafted)

    def _run(self, taken: Sequence[_Taken], hidden: Float32) -> tuple[Int32, Float32]:
        """Returns the numbers of the rows that precede drafts, and the logits [rows, vocabulary] of these rows."""
        counts = [len(each.tokens) for each in taken]
        starts = np.cumsum([0, *counts], dtype=np.int32)
        lines = np.array([end - 1 for end, each in zip(starts[1:], taken, strict=True) if each.most], np.int32)
        batch = Batch(
            tokens=np.array([token for each in taken for token in each.tokens], np.int32),
            positions=np.concatenate([np.arange(e.position, e.position + len(e.tokens)) for e in taken]).astype(
                np.int32
            ),
            sequence_starts=starts,
            table_starts=np.cumsum([0, *(len(each.tables) for each in taken)], dtype=np.int32),
            block_tables=np.concatenate([each.tables for each in taken]),
            output_rows=lines,
        )
        return lines, self._stage.run(batch, np.ascontiguousarray(hidden))

    def _choose(self, drafting: Sequence[_Taken], logits: Float32, tasks: SamplingTasks, later: int) -> None:
        """Samples a token from each row of logits. `later` is the draft's distance from the last sampled token."""
        if not drafting:
            return
        rows = self._sampler.sample(logits, tasks.drafts([each.output for each in drafting], later)).rows
        for each, row in zip(drafting, rows, strict=True):
            if row.token < 0:
                each.most = 0
                continue
            each.drafted.append(row.token)
            each.position += 1

    def close(self) -> None:
        self._stage.close()


def _taken(frame: MicrobatchFrame, outcomes: RowOutcomes, tasks: SamplingTasks) -> list[_Taken]:
    tokens, positions, starts, table_starts, block_tables, output_rows, *_ = frame.arrays
    orders = {chunk: (None if token < 0 else token, drafts) for chunk, token, drafts in frame.draft_orders}
    rows, scored, taken = outcomes.rows, tasks.scored, []
    for index, (start, end) in enumerate(pairwise(starts.tolist())):
        at, next_at = np.searchsorted(output_rows, (start, end)).tolist()
        next_token, drafts = orders.get(index, (None, 0))
        results = rows[at:next_at]
        known = tuple(tokens[start:end].tolist())
        behind, chosen = following(known, next_token, [row.token for row in results], scored[at:next_at])
        if behind:
            tables = block_tables[table_starts[index] : table_starts[index + 1]]
            each = _Taken(tables, len(tables) * KV_BLOCK_TOKENS, start, int(positions[start]), behind)
            if chosen is not None and not (results[chosen].forced or results[chosen].forced_draft):
                each.output, each.most = at + chosen, drafts
            taken.append(each)
    return taken


def following(
    tokens: tuple[int, ...], next_token: int | None, chosen: Sequence[int], scored: Sequence[bool]
) -> tuple[tuple[int, ...], int | None]:
    """Returns the token after each of the chunk's rows, up to the first rejected draft. Also returns the last
    token's index in `chosen`, or None if the last token was not sampled."""
    for index, (token, is_scored) in enumerate(zip(chosen, scored, strict=True)):
        place = len(tokens) - len(chosen) + index
        if is_scored:
            continue
        if token < 0:
            return tokens[1 : place + 1], None
        if place + 1 == len(tokens) or tokens[place + 1] != token:
            return (*tokens[1 : place + 1], token), index
    return tokens[1:] if next_token is None else (*tokens[1:], next_token), None
