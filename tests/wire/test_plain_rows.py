"""Rows of decode are encoded without protobuf's objects: the bytes are those that protobuf writes."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llamaclust.core.limits import MAX_KV_BLOCKS, MAX_VOCABULARY
from llamaclust.core.sampling import RowTask, SampleTask, SamplingParams, ScoreTask
from llamaclust.core.sampling_bounds import MAX_CONTEXT_TOKENS
from llamaclust.proto import microbatch_pb2, sampling_pb2
from llamaclust.wire.microbatch import chunks
from llamaclust.wire.microbatch.chunks import chunk_bytes
from llamaclust.wire.microbatch.codec import decode_inputs, decode_microbatch, encode_inputs, encode_microbatch
from llamaclust.wire.microbatch.fields import packed, varint
from llamaclust.wire.microbatch.messages import Chunk, Microbatch, SamplingInputs

tokens = st.integers(0, MAX_VOCABULARY - 1)
tables = st.lists(st.tuples(st.integers(0, MAX_KV_BLOCKS - 1000), st.integers(1, 1000)), min_size=1, max_size=20)
plain_chunks = st.builds(
    Chunk,
    st.tuples(tokens),
    st.integers(0, MAX_CONTEXT_TOKENS - 1),
    tables.map(lambda runs: tuple(chain.from_iterable(runs))),
    st.integers(0, 1),
)
PARAMS = (
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9),
    SamplingParams(logit_bias=((3, 1.5),)),
)
samples = st.builds(
    SampleTask,
    st.sampled_from(PARAMS),
    st.sampled_from((0, 1, 127, 128, 2**64 - 1)),
    st.integers(0, 2),
    st.integers(0, MAX_CONTEXT_TOKENS - 9),
    st.sampled_from(((), (5, 300))),
    st.lists(tokens, max_size=70).map(tuple),
    st.integers(0, 5),
    st.integers(0, 3),
    st.sampled_from((None, 0, 64)),
    st.sampled_from((None, 0, 64)),
)
rows = st.lists(samples | st.builds(ScoreTask, tokens, st.integers(0, 5)), max_size=6)


@given(st.integers(1, 2**64 - 1))
@example(2**64 - 1)
@example(0x7F)
@example(0x3FFF)
@example(0x4000)
def test_numbers_are_written_as_protobuf_writes_them(number: int) -> None:
    assert microbatch_pb2.RowReference(number=number).SerializeToString() == b"\x08" + varint(number)
    inputs = sampling_pb2.SamplingInputs(released=[number, 1])
    assert inputs.SerializeToString() == b"\x22" + packed((number, 1))


@given(st.lists(plain_chunks, min_size=1, max_size=4))
def test_chunks_of_decode(given_chunks: list[Chunk]) -> None:
    microbatch = Microbatch("ab", 1, 2, tuple(given_chunks))
    data = encode_microbatch(microbatch)
    assert microbatch_pb2.Microbatch.FromString(data).SerializeToString() == data
    assert decode_microbatch(data) == microbatch


def test_a_table_that_repeats_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many sequences at once, until it grows."""
    encoded: list[tuple[int, ...]] = []

    def counted(numbers: tuple[int, ...]) -> bytes:
        encoded.append(numbers)
        return packed(numbers)

    monkeypatch.setattr(chunks, "packed", counted)
    given = [tuple(range(1000 * number, 1000 * number + 400)) for number in range(100, 200)]
    for position in range(30):
        for table in given:
            chunk_bytes(Chunk((1,), position, table, 1))
    assert encoded == given


def test_kept_tables_take_a_bounded_memory() -> None:
    """Those of sequences whose memory is in thousands of pieces are long, and another one comes with each piece."""
    for number in range(1 << 21, (1 << 21) + 160):
        chunk_bytes(Chunk((1,), 5, tuple(range(number, number + 4096)), 1))
    tables = chunks._tables
    assert 4096 < sum(map(len, (*tables._newer, *tables._older))) <= chunks._KEPT_NUMBERS < 160 * 4096


@given(rows, st.lists(st.integers(0, 3), min_size=6, max_size=6), st.lists(st.integers(0, 2**63), max_size=2))
def test_tasks_and_those_next_to_them(first: list[RowTask], further: list[int], released: list[int]) -> None:
    tasks: list[RowTask] = []
    for task, count in zip(first, further, strict=False):
        tasks.append(task)
        for _ in range(count if isinstance(task, SampleTask) else 0):
            last = tasks[-1]
            assert isinstance(last, SampleTask)
            tasks.append(last.next())
    inputs = SamplingInputs(1, 2, tuple(tasks), tuple(released))
    data = encode_inputs(inputs)
    message = sampling_pb2.SamplingInputs.FromString(data)
    assert message.SerializeToString() == data
    assert decode_inputs(data) == inputs
    assert len(message.tasks) <= len(first)


def test_what_is_kept_of_a_task_is_not_taken_for_another_one() -> None:
    task = SampleTask(SamplingParams(), 1, 0, 5)
    others = (
        replace(task, params=SamplingParams(temperature=1.0)),
        replace(task, seed=2),
        replace(task, choice=1),
        replace(task, position=6),
        replace(task, suppressed=(1,)),
        replace(task, top_logprobs=1),
        replace(task, history_rows=1),
        replace(task, penalty_window=0),
        replace(task, dry_window=0),
        replace(task, mu=2.0),
        replace(task, history=(1,)),
        replace(task, breakers=((1,),)),
    )
    inputs = SamplingInputs(1, 2, (task, *others, task))
    assert decode_inputs(encode_inputs(inputs)) == inputs
