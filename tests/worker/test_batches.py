"""Tests that microbatches become valid arrays for backends, or an error that names the invalid part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llamaclust.core.errors import ProtocolError
from llamaclust.core.limits import StageLimits
from llamaclust.wire.microbatch.messages import Chunk, Microbatch
from support.clusters.fakes import blocks_of
from support.wire.frame_reader import build_batch

LIMITS = StageLimits(max_batch_tokens=400, max_outputs=100, max_sequences=12, max_context_tokens=512, kv_blocks=200)
VOCABULARY = 1000


def _random_microbatch(rng: np.random.Generator) -> Microbatch:
    chunks = []
    for _ in range(rng.integers(1, 13)):
        length = int(rng.choice([1, 1, 1, 2, 17, 33]))
        position = int(rng.integers(0, LIMITS.max_context_tokens - length))
        blocks = -(-(position + length) // 16) + int(rng.integers(0, 1 + (512 - position - length) // 16))
        table: list[int] = []
        while blocks:
            count = int(rng.integers(1, blocks + 1))
            table += (int(rng.integers(0, LIMITS.kv_blocks - count + 1)), count)
            blocks -= count
        tokens = tuple(int(token) for token in rng.integers(0, VOCABULARY, length))
        chunks.append(Chunk(tokens, position, tuple(table), int(rng.integers(0, min(length, 8) + 1))))
    return Microbatch("m", 1, 0, tuple(chunks))


@pytest.mark.parametrize("seed", range(30))
def test_batches_are_what_a_plain_loop_builds(seed: int) -> None:
    microbatch = _random_microbatch(np.random.default_rng(seed))
    batch = build_batch(microbatch, LIMITS, VOCABULARY)
    row = 0
    outputs: list[int] = []
    for number, chunk in enumerate(microbatch.chunks):
        assert batch.sequence_starts[number] == row
        blocks = blocks_of(chunk)
        assert batch.block_tables[batch.table_starts[number] : batch.table_starts[number + 1]].tolist() == blocks
        rows = slice(row, row + len(chunk.tokens))
        assert batch.tokens[rows].tolist() == list(chunk.tokens)
        assert batch.positions[rows].tolist() == list(range(chunk.position, chunk.position + len(chunk.tokens)))
        row += len(chunk.tokens)
        outputs += range(row - chunk.outputs, row)
    assert batch.rows == batch.sequence_starts[-1] == row
    assert batch.output_rows.tolist() == outputs
    arrays = (batch.tokens, batch.positions, batch.sequence_starts, batch.table_starts, batch.block_tables)
    assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in (*arrays, batch.output_rows))


GOOD = Chunk((1, 2), 14, (0, 1), 2)
BAD = {
    "tokens": (replace(GOOD, tokens=(1,) * 401, position=0, table=(0, 26)),),
    "sequences": (GOOD,) * 13,
    "output rows": (replace(GOOD, tokens=(1,) * 101, position=0, table=(0, 7), outputs=101),),
    "sequence of 513 positions": (replace(GOOD, position=511, table=(0, 33)),),
    "vocabulary": (replace(GOOD, tokens=(1, VOCABULARY)),),
    "KV block 200": (replace(GOOD, table=(200, 1)),),
    "block table": (replace(GOOD, position=15),),
    "at most 32": (replace(GOOD, table=(0, 150, 0, 150)),),
}


STATES = replace(LIMITS, state_blocks=6)
FIRST = Chunk((1, 2), 0, (0, 1), 0, state_to=(1, 4, 2, 0))
NEXT = Chunk((3,), 2, (0, 1), 1, state_from=0, state_to=(1, 0))
BAD_STATES = {
    "no block for the state": (replace(FIRST, state_to=(1, 4)),),
    "of 2 tokens has no block": (replace(FIRST, state_to=()),),
    "from position 0 on reads state block 3": (replace(FIRST, state_from=3),),
    "from position 2 on reads state block None": (replace(NEXT, state_from=None),),
    "state block 6 of 6": (replace(NEXT, state_to=(1, 6)),),
    "state block 9 of 6": (replace(NEXT, state_from=9),),
    "state block 4 is written by chunk 0 and read by chunk 1 of 2": (
        FIRST,
        replace(NEXT, state_from=4, state_to=(1, 5)),
    ),
    "state block 4 is written twice, by chunks 0 and 1 of 2": (FIRST, replace(NEXT, state_from=5, state_to=(1, 4))),
    "state block 0 is written twice, by chunks 0 and 0 of 1": (replace(FIRST, state_to=(1, 0, 2, 0)),),
}


def test_states_are_read_and_written_where_chunks_say() -> None:
    both = (FIRST, replace(NEXT, state_from=5, state_to=(1, 5)), replace(NEXT, state_from=3, state_to=(1, 2)))
    states = build_batch(Microbatch("m", 1, 0, both), STATES, VOCABULARY).states
    assert states is not None
    found = [array.tolist() for array in (states.before, states.starts, states.rows, states.blocks)]
    assert found == [[-1, 5, 3], [0, 2, 3, 4], [0, 1, 2, 3], [4, 0, 5, 2]]
    assert build_batch(Microbatch("m", 1, 0, both), LIMITS, VOCABULARY).states is None


@pytest.mark.parametrize("what", BAD_STATES)
def test_states_that_do_not_fit_are_refused_by_name(what: str) -> None:
    with pytest.raises(ProtocolError, match=what):
        build_batch(Microbatch("m", 1, 0, BAD_STATES[what]), STATES, VOCABULARY)


@pytest.mark.parametrize("what", BAD)
def test_microbatches_that_do_not_fit_are_refused_by_name(what: str) -> None:
    assert build_batch(Microbatch("m", 1, 0, (GOOD,)), LIMITS, VOCABULARY).rows == 2
    with pytest.raises(ProtocolError, match=what):
        build_batch(Microbatch("m", 1, 0, BAD[what]), LIMITS, VOCABULARY)


def test_adapters_are_scales_of_rows() -> None:
    chunks = (Chunk((1, 2), 0, (0, 1), 0, adapters=((1, 0.5),)), Chunk((3,), 0, (1, 1), 1))
    batch = build_batch(Microbatch("m", 1, 0, chunks), LIMITS, VOCABULARY, adapters=2)
    assert batch.adapter_scales is not None and batch.adapter_scales.tolist() == [[0, 0.5], [0, 0.5], [0, 0]]
    assert build_batch(Microbatch("m", 1, 0, chunks[1:]), LIMITS, VOCABULARY, adapters=2).adapter_scales is None
    with pytest.raises(ProtocolError, match="a sequence with adapter 1, the model has 1"):
        build_batch(Microbatch("m", 1, 0, chunks), LIMITS, VOCABULARY, adapters=1)
