"""Builds a backend's batches from microbatches in plain Python, for comparison with the native reader."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from operator import add

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import Batch, BatchStates, GivenRows
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.microbatch.messages import Chunk, ImageRows, Microbatch

_FEW = 256  # at most so many numbers are built faster by plain Python than by NumPy


def plain_batch(
    microbatch: Microbatch,
    limits: StageLimits,
    vocabulary: int,
    window: int | None = None,
    adapters: int = 0,
    images: tuple[int, int] = (0, 0),
) -> Batch:
    """Builds the batch of a microbatch. `window`: attention window of a layer; `adapters`: their number; `images`: the
    width of an image's row and the rope sections. Raises ProtocolError if the microbatch exceeds the limits, the
    vocabulary, the adapters, its own block tables or its chunks."""
    chunks = microbatch.chunks
    lengths = [len(chunk.tokens) for chunk in chunks]
    outputs = [chunk.outputs for chunk in chunks]
    row_ends = list(accumulate(lengths))
    for what, value, most in (
        ("tokens", row_ends[-1], limits.max_batch_tokens),
        ("output rows", sum(outputs), limits.max_outputs),
        ("sequences", len(chunks), limits.max_sequences),
    ):
        if value > most:
            raise ProtocolError(f"microbatch with {value} {what}, this stage is planned for {most}")
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
        window_tables=_window_tables(chunks, table_lengths, limits, window) if limits.gives_up(window) else None,
        adapter_scales=_adapter_scales(chunks, lengths, adapters) if any(chunk.adapters for chunk in chunks) else None,
        states=batch_states(chunks, limits) if limits.state_blocks else None,
        rope_positions=_rope_positions(chunks, limits, images[1]),
        groups=_groups(chunks),
        given=_given(chunks, images[0]),
    )


def _image_rows(chunks: tuple[Chunk, ...]) -> list[tuple[int, Chunk, ImageRows]]:
    """Returns chunks with image rows and their first rows; raises ProtocolError if ranges are not in order."""
    starts = accumulate((len(chunk.tokens) for chunk in chunks), initial=0)
    found = [
        (start, chunk, chunk.images) for start, chunk in zip(starts, chunks, strict=False) if chunk.images is not None
    ]
    for _, chunk, images in found:
        for ranges in (images.given, images.groups):
            ends = [0, *(end for _, end in ranges)]
            if any(not before <= first < end for before, (first, end) in zip(ends, ranges, strict=False)):
                raise ProtocolError("ranges of rows that are empty or not in order")
            if ends[-1] > len(chunk.tokens):
                raise ProtocolError("rows behind the last one")
    return found


def _given(chunks: tuple[Chunk, ...], width: int) -> GivenRows | None:
    found = _image_rows(chunks)
    rows = [start + row for start, _, images in found for ranges in images.given for row in range(*ranges)]
    values = np.frombuffer(b"".join(images.values for *_, images in found), np.float32)
    if len(values) != len(rows) * width:
        raise ProtocolError(f"{len(values)} values of {len(rows)} rows")
    return GivenRows(np.array(rows, np.int32), values.reshape(-1, width)) if rows else None


def _groups(chunks: tuple[Chunk, ...]) -> NDArray[np.int32] | None:
    """Returns the positions [start, end) of each row's group, [rows, 2]."""
    own = [[position, position + 1] for chunk in chunks for position in _positions(chunk)]
    found = _image_rows(chunks)
    for start, chunk, images in found:
        for first, end in images.groups:
            own[start + first : start + end] = [[chunk.position + first, chunk.position + end]] * (end - first)
    return np.array(own, np.int32) if any(images.groups for *_, images in found) else None


def _rope_positions(chunks: tuple[Chunk, ...], limits: StageLimits, sections: int) -> NDArray[np.int32] | None:
    """Returns rope positions [sections, rows]."""
    if not any(images.rope_positions for *_, images in _image_rows(chunks)):
        return None
    parts = [
        np.frombuffer(chunk.images.rope_positions, np.int32).reshape(len(chunk.tokens), -1)
        if chunk.images is not None and chunk.images.rope_positions
        else np.repeat(np.array(_positions(chunk), np.int32)[:, None], sections, axis=1)
        for chunk in chunks
    ]
    if any(part.shape[1] != sections or part.min() < 0 or part.max() >= limits.max_context_tokens for part in parts):
        raise ProtocolError(f"rope positions that are not {sections} within the context")
    return np.concatenate(parts).T


def _positions(chunk: Chunk) -> range:
    return range(chunk.position, chunk.position + len(chunk.tokens))


def embedded_rows(microbatch: Microbatch) -> NDArray[np.int32]:
    """Returns the rows of the microbatch whose hidden states are requested, ascending."""
    starts = accumulate((len(chunk.tokens) for chunk in microbatch.chunks), initial=0)
    firsts = [start + chunk.embedded[0] for start, chunk in zip(starts, microbatch.chunks, strict=False)]
    return _ranges(firsts, [chunk.embedded_rows for chunk in microbatch.chunks])


def _adapter_scales(chunks: tuple[Chunk, ...], lengths: list[int], adapters: int) -> NDArray[np.float32]:
    """Returns scales [rows, adapters]."""
    scales = np.zeros((len(chunks), adapters), np.float32)
    for index, chunk in enumerate(chunks):
        for number, scale in chunk.adapters:
            if number >= adapters:
                raise ProtocolError(f"a sequence with adapter {number}, the model has {adapters}")
            scales[index, number] = scale
    return np.repeat(scales, lengths, axis=0)


def _window_tables(
    chunks: tuple[Chunk, ...], table_lengths: list[int], limits: StageLimits, window: int | None
) -> NDArray[np.int32]:
    """Builds tables as long as the block tables, with -1 for absent blocks."""
    tables = np.full(sum(table_lengths), -1, np.int32)
    for chunk, start in zip(chunks, accumulate(table_lengths, initial=0), strict=False):
        blocks = _window_blocks(chunk, limits, window or 0)
        at = start + chunk.window_start
        tables[at : at + len(blocks)] = blocks
    return tables


def _window_blocks(chunk: Chunk, limits: StageLimits, window: int) -> NDArray[np.int32]:
    starts, counts = chunk.window_table[::2], chunk.window_table[1::2]
    if (end := max(map(add, starts, counts), default=0)) > limits.window_blocks:
        raise ProtocolError(f"window block {end - 1} of {limits.window_blocks}")
    last = -(-(chunk.position + len(chunk.tokens)) // KV_BLOCK_TOKENS)
    first = max(0, chunk.position - window + 1) // KV_BLOCK_TOKENS
    if chunk.window_start > first or chunk.window_start + sum(counts) != last:
        has = f"[{chunk.window_start}, {chunk.window_start + sum(counts)})"
        raise ProtocolError(f"window table of blocks {has}, of {window} positions to see needs [{first}, {last})")
    return _ranges(list(starts), list(counts))


def _table_length(chunk: Chunk, limits: StageLimits) -> int:
    """Checks a chunk's block table and returns its number of blocks."""
    context = chunk.position + len(chunk.tokens)
    if context > limits.max_context_tokens:
        raise ProtocolError(f"sequence of {context} positions, this stage is planned for {limits.max_context_tokens}")
    starts, counts = chunk.table[::2], chunk.table[1::2]
    length, end = sum(counts), max(map(add, starts, counts))
    if end > limits.kv_blocks:
        raise ProtocolError(f"KV block {end - 1} of {limits.kv_blocks}")
    most = -(-limits.max_context_tokens // KV_BLOCK_TOKENS)
    if length * KV_BLOCK_TOKENS < context or length > most:
        raise ProtocolError(f"block table of {length} blocks for {context} positions, at most {most}")
    return length


def _tokens(chunks: tuple[Chunk, ...], rows: int, vocabulary: int) -> NDArray[np.int32]:
    ids = chunks[0].tokens if len(chunks) == 1 else list(chain.from_iterable(chunk.tokens for chunk in chunks))
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or highest >= vocabulary:
        raise ProtocolError(f"token {highest if lowest >= 0 else lowest} is not in the vocabulary of {vocabulary}")
    return np.fromiter(ids, np.int32, rows)


def _ranges(firsts: list[int], counts: list[int]) -> NDArray[np.int32]:
    """Returns the numbers firsts[0] .. firsts[0] + counts[0] - 1, then firsts[1] .. and so on."""
    total = sum(counts)
    if total <= _FEW:
        numbers = [
            number for first, count in zip(firsts, counts, strict=True) for number in range(first, first + count)
        ]
        return np.array(numbers, np.int32)
    ends = np.cumsum(counts)
    offsets = np.repeat(np.array(firsts) - ends + counts, counts)
    return (offsets + np.arange(total)).astype(np.int32)


def batch_states(chunks: Sequence[Chunk], limits: StageLimits) -> BatchStates:
    """Builds the batch's states; raises ProtocolError for blocks that the stage lacks, a missing state, and a block
    that one sequence writes and another one uses."""
    for chunk in chunks:
        _check(chunk, limits)
    written = [block for chunk in chunks for block in chunk.state_to[1::2]]
    others = [chunk.state_from for chunk in chunks if chunk.state_from not in chunk.state_to[1::2]]
    if len(set(written)) < len(written) or not set(written).isdisjoint(others):
        raise _sharing_error(chunks)
    firsts = accumulate((len(chunk.tokens) for chunk in chunks), initial=0)
    rows = [first + count - 1 for first, chunk in zip(firsts, chunks, strict=False) for count in chunk.state_to[::2]]
    starts = accumulate((len(chunk.state_to) // 2 for chunk in chunks), initial=0)
    return BatchStates(
        before=np.array([-1 if chunk.state_from is None else chunk.state_from for chunk in chunks], np.int32),
        starts=np.fromiter(starts, np.int32),
        rows=np.array(rows, np.int32),
        blocks=np.array(written, np.int32),
    )


def _sharing_error(chunks: Sequence[Chunk]) -> ProtocolError:
    """Returns an error with a block that is written twice, or that one chunk writes and another one reads."""
    writers: dict[int, int] = {}
    for number, chunk in enumerate(chunks):
        for block in chunk.state_to[1::2]:
            if block in writers:
                of = f"chunks {writers[block]} and {number} of {len(chunks)}"
                return ProtocolError(f"state block {block} is written twice, by {of}")
            writers[block] = number
    number, block = next(
        (number, chunk.state_from)
        for number, chunk in enumerate(chunks)
        if chunk.state_from is not None and writers.get(chunk.state_from, number) != number
    )
    return ProtocolError(
        f"state block {block} is written by chunk {writers[block]} and read by chunk {number} of {len(chunks)}"
    )


def _check(chunk: Chunk, limits: StageLimits) -> None:
    if chunk.state_to[-2:-1] != (len(chunk.tokens),):
        raise ProtocolError(f"a chunk of {len(chunk.tokens)} tokens has no block for the state after them")
    if (chunk.state_from is None) != (chunk.position == 0):
        raise ProtocolError(f"a chunk from position {chunk.position} on reads state block {chunk.state_from}")
    if (last := max(*chunk.state_to[1::2], chunk.state_from or 0)) >= limits.state_blocks:
        raise ProtocolError(f"state block {last} of {limits.state_blocks}")
