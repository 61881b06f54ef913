"""Microbatches as arrays for a backend; everything that depends on the loaded stage is checked here."""

from __future__ import annotations

from itertools import chain

import numpy as np
from numpy.typing import NDArray

from llamaclust.errors import WireError
from llamaclust.kernels.backend import Batch, Limits
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.messages import Chunk, Microbatch

Int64 = NDArray[np.int64]


def build_batch(microbatch: Microbatch, limits: Limits, vocabulary: int) -> Batch:
    """The batch of a microbatch. WireError where it exceeds the limits, the vocabulary or its own block tables."""
    chunks = microbatch.chunks
    lengths = np.array([len(chunk.tokens) for chunk in chunks])
    positions = np.array([chunk.position for chunk in chunks])
    outputs = np.array([chunk.outputs for chunk in chunks])
    row_ends = np.cumsum(lengths)
    _check_counts(int(row_ends[-1]), int(outputs.sum()), len(chunks), int((positions + lengths).max()), limits)
    table_starts, block_tables = _tables(chunks, positions + lengths, limits)
    return Batch(
        tokens=_tokens(chunks, int(row_ends[-1]), vocabulary),
        positions=_ranges(positions, lengths),
        sequence_starts=_starts(row_ends),
        table_starts=table_starts,
        block_tables=block_tables,
        output_rows=_ranges(row_ends - outputs, outputs),
    )


def _check_counts(rows: int, outputs: int, sequences: int, context: int, limits: Limits) -> None:
    """`context`: the longest sequence in positions, this microbatch included."""
    for what, value, most in (
        ("tokens", rows, limits.max_tokens),
        ("output rows", outputs, limits.max_outputs),
        ("sequences", sequences, limits.max_sequences),
        ("positions of a sequence", context, limits.max_context_tokens),
    ):
        if value > most:
            raise WireError(f"microbatch with {value} {what}, this stage is planned for {most}")


def _tokens(chunks: tuple[Chunk, ...], rows: int, vocabulary: int) -> NDArray[np.int32]:
    tokens = np.fromiter(chain.from_iterable(chunk.tokens for chunk in chunks), np.int32, rows)
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise WireError(f"token {tokens.max()} is not in the vocabulary of {vocabulary}")
    return tokens


def _tables(chunks: tuple[Chunk, ...], contexts: Int64, limits: Limits) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Table starts [sequences + 1] and block ids; lengths are checked before runs are expanded."""
    runs = [run for chunk in chunks for run in chunk.table]
    firsts = np.array([run.start for run in runs])
    counts = np.array([run.count for run in runs])
    lengths = np.array([sum([run.count for run in chunk.table]) for chunk in chunks])
    most = -(-limits.max_context_tokens // KV_BLOCK_TOKENS)
    if (lengths * KV_BLOCK_TOKENS < contexts).any() or lengths.max() > most:
        raise WireError(f"block table shorter than its sequence or longer than {most} blocks")
    if (firsts + counts).max() > limits.kv_blocks or firsts.min() < 0:
        raise WireError(f"KV block {(firsts + counts).max() - 1} of {limits.kv_blocks}")
    return _starts(np.cumsum(lengths)), _ranges(firsts, counts)


def _starts(ends: Int64) -> NDArray[np.int32]:
    starts = np.zeros(len(ends) + 1, np.int32)
    starts[1:] = ends
    return starts


def _ranges(firsts: Int64, counts: Int64) -> NDArray[np.int32]:
    """firsts[0] .. firsts[0] + counts[0] - 1, firsts[1] .. and so on."""
    ends = np.cumsum(counts)
    offsets = np.repeat(firsts - ends + counts, counts)
    return (offsets + np.arange(len(offsets))).astype(np.int32)
