"""State blocks of a microbatch as arrays for a backend, checked against the loaded stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import StageLimits
from llamaclust.kernels.backend import BatchStates
from llamaclust.wire.microbatch.messages import Chunk


def batch_states(chunks: Sequence[Chunk], limits: StageLimits) -> BatchStates:
    """ProtocolError for blocks that the stage does not have, a state that is missing, and a block that one sequence
    writes and another one uses."""
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
    """Names a block that is written twice, or that one chunk writes and another one reads."""
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
        raise ProtocolError(f"a chunk of {len(chunk.tokens)} tokens has no block for the state behind them")
    if (chunk.state_from is None) != (chunk.position == 0):
        raise ProtocolError(f"a chunk from position {chunk.position} on reads state block {chunk.state_from}")
    if (last := max(*chunk.state_to[1::2], chunk.state_from or 0)) >= limits.state_blocks:
        raise ProtocolError(f"state block {last} of {limits.state_blocks}")
