"""Microbatches as arrays for a backend; everything that depends on the loaded stage is checked here."""

from __future__ import annotations

from itertools import accumulate, chain
from operator import add

import numpy as np
from numpy.typing import NDArray

from llamaclust.errors import WireError
from llamaclust.kernels.backend import Batch
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.control import StageLimits
from llamaclust.wire.messages import Chunk, Microbatch

_FEW = 256
"""So many numbers are made faster by plain Python than by NumPy's calls."""


def build_batch(microbatch: Microbatch, limits: StageLimits, vocabulary: int) -> Batch:
    """The batch of a microbatch. WireError where it exceeds the limits, the vocabulary or its own block tables."""
    chunks = microbatch.chunks
    lengths = [len(chunk.tokens) for chunk in chunks]
    outputs = [chunk.outputs for chunk in chunks]
    row_ends = list(accumulate(lengths))
    _check_counts(chunks, row_ends[-1], sum(outputs), limits)
    table_lengths = [_table_length(chunk, limits) for chunk in chunks]
    return Batch(
        tokens=_tokens(chunks, row_ends[-1], vocabulary),
        positions=_ranges([chunk.position for chunk in chunks], lengths),
        sequence_starts=np.array([0, *row_ends], np.int32),
        table_starts=np.array([0, *accumulate(table_lengths)], np.int32),
        block_tables=_ranges(
            [start for chunk in chunks for start in chunk.table[::2]],
            [count for chunk in chunks for count in chunk.table[1::2]],
        ),
        output_rows=_ranges([end - count for end, count in zip(row_ends, outputs, strict=True)], outputs),
    )


def _check_counts(chunks: tuple[Chunk, ...], rows: int, outputs: int, limits: StageLimits) -> None:
    for what, value, most in (
        ("tokens", rows, limits.max_tokens),
        ("output rows", outputs, limits.max_outputs),
        ("sequences", len(chunks), limits.max_sequences),
    ):
        if value > most:
            raise WireError(f"microbatch with {value} {what}, this stage is planned for {most}")


def _table_length(chunk: Chunk, limits: StageLimits) -> int:
    """Blocks of a chunk's table, which is checked here before it is written out."""
    context = chunk.position + len(chunk.tokens)
    if context > limits.max_context_tokens:
        raise WireError(f"sequence of {context} positions, this stage is planned for {limits.max_context_tokens}")
    starts, counts = chunk.table[::2], chunk.table[1::2]
    length, end = sum(counts), max(map(add, starts, counts))
    if end > limits.kv_blocks:
        raise WireError(f"KV block {end - 1} of {limits.kv_blocks}")
    most = -(-limits.max_context_tokens // KV_BLOCK_TOKENS)
    if length * KV_BLOCK_TOKENS < context or length > most:
        raise WireError(f"block table of {length} blocks for {context} positions, at most {most}")
    return length


def _tokens(chunks: tuple[Chunk, ...], rows: int, vocabulary: int) -> NDArray[np.int32]:
    ids = chunks[0].tokens if len(chunks) == 1 else list(chain.from_iterable(chunk.tokens for chunk in chunks))
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or highest >= vocabulary:
        raise WireError(f"token {highest if lowest >= 0 else lowest} is not in the vocabulary of {vocabulary}")
    return np.fromiter(ids, np.int32, rows)


def _ranges(firsts: list[int], counts: list[int]) -> NDArray[np.int32]:
    """firsts[0] .. firsts[0] + counts[0] - 1, firsts[1] .. and so on."""
    total = sum(counts)
    if total <= _FEW:
        numbers = [
            number for first, count in zip(firsts, counts, strict=True) for number in range(first, first + count)
        ]
        return np.array(numbers, np.int32)
    ends = np.cumsum(counts)
    offsets = np.repeat(np.array(firsts) - ends + counts, counts)
    return (offsets + np.arange(total)).astype(np.int32)
