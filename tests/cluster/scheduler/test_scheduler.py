from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaclust.cluster.scheduler.requests import FinishReason, GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.sequences import Phase
from llamaclust.core.errors import ProtocolError, QueueFullError, RequestError
from llamaclust.core.sampler.bounds import MAX_BREAKERS_TOKENS
from llamaclust.core.sampler.params import SamplingParams
from llamaclust.core.sampler.results import RowResult
from llamaclust.model.program import KV_BLOCK_TOKENS
from llamaclust.wire.microbatch.messages import Result
from support.clusters.fakes import VOCABULARY, reason_of
from support.plans.simulations import (
    BASE,
    DRY,
    check_answer,
    check_writes,
    generation,
    random_request,
    simulation,
)


class Counted(tuple[int, ...]):
    """A prompt that counts how often its tokens are read."""

    reads = 0

    def __iter__(self) -> Iterator[int]:
        self.reads += 1
        return super().__iter__()


@pytest.mark.parametrize("chunk", [1, 7, 64, 127, None])
@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("kv_blocks", [13, 17, 64])
def test_answers_do_not_depend_on_chunks_stages_or_memory(chunk: int | None, stages: int, kv_blocks: int) -> None:
    run = simulation(stages, prefill_chunk=chunk, kv_blocks=kv_blocks)
    check_writes(run)
    requests = [generation(length, 40, start=length % 5) for length in (1, 2, 16, 17, 33, 100, 100, 150)]
    keys = [run.add(request) for request in requests]
    run.finish()
    for key, request in zip(keys, requests, strict=True):
        check_answer(run, key, request)
    assert run.scheduler.counts.kv_blocks_held == 0
    if kv_blocks == 64:
        assert run.scheduler.counts.preemptions == 0


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_mixes_give_the_same_tokens_and_leak_nothing(seed: int) -> None:
    random_ = random.Random(seed)
    run = simulation(
        stages=random_.randint(1, 4),
        fixed_us=random_.choice([0, 100, 1000]),
        row_us=random_.choice([1, 10, 500]),
        hop_us=random_.choice([0, 1, 50, 1000]),
        prefill_chunk=random_.choice([None, None, 1, 5, 16, 100]),
        kv_blocks=random_.randint(13, 40),
        max_sequences=random_.randint(1, 8),
        max_outputs=random_.randint(8, 16),
        prefix_cache=random_.random() < 0.8,
    )
    check_writes(run)
    requests: dict[int, GenerationRequest] = {}
    aborted: set[int] = set()
    for _ in range(random_.randint(1, 14)):
        request = random_request(random_)
        key = run.add(request)
        requests[key] = request
        for _ in range(random_.choice([0, 0, 1, 5, 20])):
            run.step()
        if random_.random() < 0.15:
            victim = random_.choice(list(requests))
            if run.scheduler.abort(victim) is not None:
                aborted.add(victim)
    run.finish()
    for key in requests.keys() - aborted:
        check_answer(run, key, requests[key])
    counts = run.scheduler.counts
    assert (counts.kv_blocks_held, counts.running, counts.waiting, counts.in_flight) == (0, 0, 0, 0)
    assert run.scheduler.queues.memory.blocks.available == counts.kv_blocks


def test_dry_breakers_that_no_last_stage_would_take_are_refused() -> None:
    run = simulation()
    many = {5: tuple((5, 1 + number % 9) for number in range(MAX_BREAKERS_TOKENS // 2))}
    with pytest.raises(RequestError, match=f"dry_sequence_breakers.* the limit is {MAX_BREAKERS_TOKENS}"):
        run.add(replace(generation(9, 3, params=DRY), breakers=many | {6: ((6,),)}))
    run.add(replace(generation(9, 3, params=DRY), breakers=many))


def test_shared_prompts_are_computed_once() -> None:
    run = simulation()
    check_writes(run)
    for start in (1, 1, 1, 2):
        run.add(generation(100, 5, start=start))
        run.finish()
    assert run.scheduler.counts.cached_tokens == 2 * 96
    assert run.scheduler.counts.computed_tokens == 100 + 4 + 4 + 100


def test_prompts_with_different_salts_share_nothing() -> None:
    run = simulation()
    for salt, cached in (("a", 0), ("b", 0), ("", 0), ("a", 96)):
        before = run.scheduler.counts.cached_tokens
        request = generation(100, 3, cache_salt=salt)
        key = run.add(request)
        run.finish()
        check_answer(run, key, request)
        assert run.scheduler.counts.cached_tokens - before == cached


def test_equal_prompts_that_arrive_together_share_too() -> None:
    run = simulation(prefill_chunk=100)
    check_writes(run)
    keys = [run.add(generation(97, 5, choice=choice)) for choice in range(4)]
    run.finish()
    assert run.scheduler.counts.computed_tokens == 97 + 3 * 1
    for choice, key in enumerate(keys):
        check_answer(run, key, generation(97, 5, choice=choice))


def test_the_last_prompt_token_is_computed_into_a_block_of_its_own() -> None:
    run = simulation()
    check_writes(run)
    for _ in range(2):
        key = run.add(generation(96, 3))
        run.finish()
        check_answer(run, key, generation(96, 3))
    assert run.scheduler.counts.cached_tokens == 80


def test_cached_blocks_are_evicted_when_memory_is_needed() -> None:
    run = simulation(kv_blocks=13)
    for start in (1, 2, 1):
        run.add(generation(190, 2, start=start))
        run.finish()
    assert run.scheduler.counts.cached_tokens <= 16
    assert run.scheduler.queues.memory.blocks.available == 13


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    run = simulation(prefix_cache=False)
    for _ in range(2):
        run.add(generation(100, 2))
        run.finish()
    assert run.scheduler.counts.computed_tokens == 200


def test_scored_rows_are_computed_though_cached() -> None:
    run = simulation(max_outputs=10)
    run.add(generation(100, 2))
    run.finish()
    request = generation(100, 0, score_from=50)
    key = run.add(request)
    run.finish()
    check_answer(run, key, request)
    assert run.scheduler.counts.cached_tokens == 48
    outputs = [sum(chunk.outputs for chunk in scheduled.microbatch.chunks) for scheduled in run.microbatches]
    assert max(outputs) <= 10


def test_scored_rows_beside_decode_are_bounded_by_their_time() -> None:
    """Other sequences wait for each microbatch, and a long scored prompt has many of these rows."""
    run = simulation(1, fixed_us=1000, row_us=1000, max_outputs=100, max_batch_tokens=200, context_length=400)
    decoding = run.add(generation(1, 300))
    run.step()
    run.step()
    keys = [run.add(generation(300, 0, start=start, score_from=0)) for start in (2, 3)]
    begun = len(run.microbatches)
    run.finish()
    beside = [
        sum(chunk.outputs for chunk in scheduled.microbatch.chunks if len(chunk.tokens) > 1)
        for scheduled in run.microbatches[begun:]
        if any(len(chunk.tokens) == 1 for chunk in scheduled.microbatch.chunks)
    ]
    assert beside[0] == 16 and max(beside) == 64 and max(beside[2:]) == 48
    assert sum(beside) > 400
    for key, start in zip(keys, (2, 3), strict=True):
        check_answer(run, key, generation(300, 0, start=start, score_from=0))
    check_answer(run, decoding, generation(1, 300))


def test_nothing_to_compute_is_no_work() -> None:
    run = simulation()
    for request in (
        generation(5, 0),
        generation(1, 0, score_from=0),
        generation(5, 0, score_from=5),
    ):
        assert run.scheduler.add(request, 1).known_end is FinishReason.LENGTH
    assert run.scheduler.next_microbatch(1) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "prompt: is empty"),
        ({"prompt": (1,) * 201}, "has 201 tokens, but this model's maximum context length is 200 tokens"),
        ({"prompt": (1,) * 200}, "200 tokens with no room"),
        ({"prompt": (1, 101)}, r"prompt: token id 101 is outside the vocabulary \[0, 101\)"),
        ({"prompt": (-1,)}, "token id -1"),
        ({"max_new_tokens": -1}, "max_tokens: must be .*, is -1"),
        ({"seed": 1 << 64}, "seed: must be"),
        ({"top_logprobs": 129}, "top_logprobs: must be .*, is 129"),
        ({"score_from": -1}, "score_from: must be .*, is -1"),
        ({"stop_token_ids": frozenset({500})}, "stop_token_ids: token id 500"),
        ({"stop_token_ids": frozenset(range(101)), "min_tokens": 1}, "stop_token_ids has all 101 tokens"),
        (
            {
                "stop_token_ids": frozenset(range(50)),
                "late_token_ids": frozenset(range(50, 101)),
                "min_tokens": 1,
            },
            "stop_token_ids has all 101 tokens",
        ),
        ({"late_token_ids": frozenset({101})}, "token id 101 is outside"),
        ({"params": SamplingParams(temperature=float("nan"))}, "temperature: must be .*, is nan"),
        ({"params": SamplingParams(top_p=1.5)}, r"top_p: must be a number within 0\.\.1, is 1\.5"),
        ({"params": SamplingParams(repetition_penalty=0.0)}, "repetition_penalty: must be .*, is 0.0"),
        ({"params": SamplingParams(logit_bias=((3, 1.0), (2, 1.0)))}, "must be ascending"),
        ({"params": SamplingParams(logit_bias=((3, float("inf")),))}, "logit_bias: must be .*, is inf"),
    ],
)
def test_bad_requests_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        simulation().scheduler.add(replace(generation(3, 5), **changes), 1)  # type: ignore[arg-type]


def test_max_tokens_ends_with_the_context() -> None:
    run = simulation()
    key = run.add(generation(190, 1000))
    run.finish()
    assert len(run.rows(key)) == 10
    assert reason_of(run.updates[key]) is FinishReason.LENGTH


def test_a_full_queue_refuses() -> None:
    run = simulation(max_sequences=2, max_waiting=3)
    for _ in range(5):
        run.add(generation(10, 5))
    with pytest.raises(QueueFullError, match=r"5 sequences of .* wait"):
        run.add(generation(10, 5))
    run.finish()


def test_a_full_queue_refuses_before_any_work() -> None:
    run = simulation(max_sequences=2, max_waiting=1)
    for _ in range(3):
        run.add(generation(10, 5))
    prompt = Counted(range(10))
    cases: list[dict[str, Any]] = [{}, {"max_new_tokens": 0, "embedded": (0, 10)}]
    for changes in cases:
        with pytest.raises(QueueFullError, match=r"3 sequences of .* wait"):
            run.add(replace(generation(1, 5), prompt=prompt, **changes))
    assert prompt.reads == 0
    run.add(replace(generation(1, 0), prompt=prompt))  # nothing to compute
    assert prompt.reads > 0


@pytest.mark.parametrize(("params", "breakers", "reads"), [(SamplingParams(), {}, 1), (DRY, {5: ((5,),)}, 2)])
def test_later_choices_check_no_token_again(params: SamplingParams, breakers: Any, reads: int) -> None:
    """Later choices copy the prompt, and DRY looks for breakers in it."""
    run, prompt = simulation(), Counted(range(50))
    request = replace(generation(1, 5), prompt=prompt, params=params, breakers=breakers)
    run.add(request)
    first = prompt.reads
    assert first > reads
    run.add(replace(request, choice=1))
    assert prompt.reads - first == reads
    with pytest.raises(RequestError, match="token id 101"):
        run.add(replace(request, prompt=(*prompt, 101), choice=2))


def test_results_out_of_turn_are_refused() -> None:
    run = simulation()
    with pytest.raises(ProtocolError, match="nothing is due"):
        run.scheduler.complete(Result(1, 0), 1)
    run.add(generation(10, 5))
    run.send_all()
    with pytest.raises(ProtocolError, match=r"microbatch 0 of epoch 0\.1 is due"):
        run.scheduler.complete(Result(1, 1), 1)
    with pytest.raises(ProtocolError, match="0 results instead of 1"):
        run.scheduler.complete(Result(1, 0), 1)


@pytest.mark.parametrize(
    "row",
    [
        RowResult(VOCABULARY, -1.0),
        RowResult(1, -1.0, ((1, -1.0), (VOCABULARY, -2.0))),
        RowResult(1, -1.0, forced=(VOCABULARY,)),
        RowResult(1, -1.0, forced_draft=(VOCABULARY,)),
    ],
    ids=["sampled", "top logprobs", "forced", "forced draft"],
)
def test_a_token_outside_the_vocabulary_is_refused(row: RowResult) -> None:
    """Otherwise a later microbatch would blame the first stage."""
    run = simulation()
    run.add(generation(10, 5))
    run.send_all()
    with pytest.raises(ProtocolError, match=f"microbatch 0 came back with token id {VOCABULARY}; .* has {VOCABULARY}"):
        run.scheduler.complete(Result(1, 0, (row,)), 1)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    run = simulation(context_length=4096, kv_blocks=600, prefill_chunk=64)
    long = run.add(generation(4000, 1))
    run.step()
    short = run.add(generation(20, 1))
    while not run.updates[short]:
        assert run.step()
    assert not run.updates[long]
    chunks = [scheduled.microbatch for scheduled in run.microbatches]
    assert len(chunks) < 10
    assert all(len(chunk.chunks[-1].tokens) >= 32 for chunk in chunks[:-1]), "the long one must go on meanwhile"
    run.finish()


def test_decode_continues_during_prefill() -> None:
    run = simulation(context_length=4096, kv_blocks=600, prefill_chunk=64)
    talking = run.add(generation(10, 200))
    for _ in range(5):
        run.step()
    before = len(run.rows(talking))
    long = run.add(generation(4000, 1, start=50))
    while not run.updates[long]:
        assert run.step()
    steps = -(-4000 // 64)
    assert len(run.rows(talking)) - before >= steps // run.scheduler.times.in_flight - 1


def test_the_oldest_is_never_preempted() -> None:
    run = simulation(kv_blocks=13)
    oldest = run.add(generation(20, 170))
    others = [run.add(generation(20, 100, start=start)) for start in range(2, 6)]
    tokens_seen = 0
    while len(run.rows(oldest)) < 170:
        assert run.step()
        first = run.scheduler.sequences[0] if run.scheduler.sequences else None
        if first is not None and first.key == oldest:
            assert len(first.kv.table) * KV_BLOCK_TOKENS >= tokens_seen
            tokens_seen = first.scheduled
    run.finish()
    assert run.scheduler.counts.preemptions > 0
    for start, key in enumerate(others, 2):
        check_answer(run, key, generation(20, 100, start=start))


def test_a_preempted_sequence_waits_for_what_is_in_flight() -> None:
    run = simulation()
    request = generation(20, 10)
    key = run.add(request)
    run.step()
    run.send_all()
    (sequence,) = run.scheduler.sequences
    assert sequence.in_flight == 1 and sequence.phase is Phase.DECODE
    run.scheduler.queues.preempt(sequence)
    assert run.scheduler.next_microbatch(run.now_ns) is None, "its next token is not known yet"
    run.finish()
    check_answer(run, key, request)


def test_a_sequence_that_is_read_from_disk_comes_before_pre_copies() -> None:
    """A pre-copy that a full queue refuses would end the pipeline."""
    other, scheduler = Scheduler(BASE, 1, 2), Scheduler(replace(BASE, max_sequences=1, max_waiting=0), 2, 2)
    moving = other.add(generation(40, 100), 0)
    assert scheduler.has_room_for(moving)
    scheduler.queues.begin_restore(scheduler.add(generation(40, 100), 0))
    assert not scheduler.has_room_for(moving)
