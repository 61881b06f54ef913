"""Tests of requests for hidden states among others for tokens: each row once, in order, with its own tokens' bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from random import Random

import numpy as np
import pytest

from llamaclust.cluster.scheduler.requests import Failed, Finished, FinishReason, GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.errors import ProtocolError
from llamaclust.wire.microbatch.messages import Microbatch, Result
from support.clusters.fakes import (
    VOCABULARY,
    WIDTH,
    FakeModel,
    FakeStages,
    Simulation,
    expected,
    hidden_state,
    linear,
    reason_of,
)
from support.seed import SEED

SETTINGS = SchedulerSettings(
    "m",
    VOCABULARY,
    context_length=200,
    kv_blocks=60,
    max_sequences=6,
    max_waiting=64,
    max_embedded_rows=20,
    embedding_length=WIDTH,
)


def stages(kv_blocks: int, count: int = 2) -> FakeStages:
    return FakeStages(FakeModel(kv_blocks), [linear(200, 10)] * count)


def embedding(number: int, prompt: tuple[int, ...], first: int = 0, end: int | None = None) -> GenerationRequest:
    return GenerationRequest(f"e{number}", prompt, 0, embedded=(first, len(prompt) if end is None else end))


def random_request(source: Random, number: int) -> GenerationRequest:
    """Draws a request, one in two for tokens; prompts have prefixes in common."""
    shared, length = source.choice((0, 33)), source.randrange(1, 100)
    prompt = tuple(range(shared)) + tuple(source.randrange(VOCABULARY) for _ in range(length))
    if source.random() < 0.5:
        return GenerationRequest(f"r{number}", prompt, source.randrange(1, 30), seed=number)
    first, end = source.choice([(0, len(prompt)), (0, 1), (len(prompt) - 1, len(prompt))])
    return embedding(number, prompt, first, end)


def check(run: Simulation, key: int, request: GenerationRequest) -> None:
    if request.embedded is None:
        assert run.rows(key) == expected(request, SETTINGS.context_length)[0]
        return
    wanted = {place: hidden_state(request.prompt[: place + 1]) for place in range(*request.embedded)}
    assert run.embedded(key) == wanted and list(run.embedded(key)) == sorted(wanted)
    assert reason_of(run.updates[key]) is FinishReason.LENGTH and not run.rows(key)


@pytest.mark.parametrize("number", range(8))
def test_every_row_comes_once_whatever_happens_around_it(number: int) -> None:
    """Other requests run, memory is short, and stages are replaced at any moment."""
    source = Random(f"{SEED} {number}")
    kv_blocks = source.choice((16, 60))
    settings = replace(SETTINGS, kv_blocks=kv_blocks, prefill_chunk=source.choice((None, 7, 24)))
    run = Simulation(Scheduler(settings, 1, 2), stages(kv_blocks))
    requests = [random_request(source, each) for each in range(20)]
    keys = [run.add(request) for request in requests]
    for epoch in range(2, 5):
        for _ in range(source.randrange(15)):
            run.step()
        run.sent.clear()
        run.stages = stages(kv_blocks)
        run.scheduler.restart(settings, epoch, 2)
    run.finish()
    for key, request in zip(keys, requests, strict=True):
        check(run, key, request)
    assert run.scheduler.queues.memory.blocks.held == 0


def test_a_result_has_so_many_rows_at_most() -> None:
    run = Simulation(Scheduler(SETTINGS, 1, 2), stages(SETTINGS.kv_blocks))
    keys = [run.add(embedding(each, (each,) * 70)) for each in range(4)]
    run.finish()
    assert max(sent.microbatch.embedded_rows for sent in run.microbatches) == SETTINGS.max_embedded_rows
    assert all(len(run.embedded(key)) == 70 for key in keys)


def test_a_request_that_ends_before_its_result_takes_no_rows_of_others() -> None:
    run = Simulation(Scheduler(SETTINGS, 1, 2), stages(SETTINGS.kv_blocks))
    requests = [embedding(each, tuple(range(each, each + 5))) for each in range(3)]
    keys = [run.add(request) for request in requests]
    run.send_all()
    assert len(run.microbatches[0].microbatch.chunks) == 3
    run.scheduler.abort(keys[0])
    run.finish()
    for key, request in zip(keys[1:], requests[1:], strict=True):
        check(run, key, request)


def test_a_result_beside_decode_has_fewer_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamaclust.cluster.scheduler.rows.chunking._EMBEDDED_BYTES", 4 * WIDTH * 5)
    run = Simulation(Scheduler(SETTINGS, 1, 2), stages(SETTINGS.kv_blocks))
    decoding = run.add(GenerationRequest("r", (1, 2, 3), 30, seed=1))
    while not run.rows(decoding):
        run.step()
    before = len(run.microbatches)
    key = run.add(embedding(0, tuple(range(18))))
    run.finish()
    rows = [sum(chunk.embedded_rows for chunk in sent.microbatch.chunks) for sent in run.microbatches[before:]]
    assert sum(rows) == 18 and max(rows) == 5 and len(run.embedded(key)) == 18


def test_the_last_row_alone_finds_its_prefix_in_the_cache_and_all_rows_do_not() -> None:
    run = Simulation(Scheduler(SETTINGS, 1, 2), stages(SETTINGS.kv_blocks))
    prompt = tuple(range(64))
    for request, cached in ((embedding(0, prompt), 0), (embedding(1, prompt, 63), 48), (embedding(2, prompt), 0)):
        key = run.add(request)
        run.finish()
        check(run, key, request)
        last = run.updates[key][-1]
        assert isinstance(last, Finished) and last.timings.cached_tokens == cached


def test_rows_behind_the_embedded_ones_are_not_computed() -> None:
    run = Simulation(Scheduler(SETTINGS, 1, 2), stages(SETTINGS.kv_blocks))
    key = run.add(embedding(0, tuple(range(100)), 0, 1))
    run.finish()
    assert sum(sent.microbatch.rows for sent in run.microbatches) == 1 and len(run.embedded(key)) == 1


def test_a_prompt_may_fill_the_context() -> None:
    settings = replace(SETTINGS, context_length=64, kv_blocks=4, max_embedded_rows=50)
    run = Simulation(Scheduler(settings, 1, 2), stages(settings.kv_blocks))
    requests = [embedding(0, tuple(range(64))), embedding(1, tuple(range(64)), 63)]
    keys = [run.add(request) for request in requests]
    run.finish()
    for key, request in zip(keys, requests, strict=True):
        check(run, key, request)


@pytest.mark.parametrize("length", [17, 40])
def test_a_long_whole_prompt_does_not_wait_for_short_ones_that_keep_coming(length: int) -> None:
    """Shorter prompts would never leave enough of a microbatch for the long one."""
    settings = replace(
        SETTINGS, kv_blocks=100, max_batch_tokens=100, max_embedded_rows=100, prefix_cache=False, whole_prompts=True
    )
    run = Simulation(Scheduler(settings, 1, 2), stages(settings.kv_blocks))
    short = (embedding(number, (number % VOCABULARY,) * length) for number in count())
    for _ in range(7):
        run.add(next(short))
    long = run.add(embedding(-1, tuple(range(95))))
    for _ in range(20):
        while len(run.scheduler.queues.waiting) < settings.max_sequences:
            run.add(next(short))
        run.step()
    assert len(run.embedded(long)) == 95
    run.finish()
    assert all(chunk.position == 0 for sent in run.microbatches for chunk in sent.microbatch.chunks)


@dataclass
class DamagedModel(FakeModel):
    """A model whose first `damaged` results are not finite."""

    damaged: int = 0

    def embeddings(self, microbatch: Microbatch) -> bytes:
        hidden = super().embeddings(microbatch)
        if not self.damaged or not hidden:
            return hidden
        self.damaged -= 1
        return np.full(len(hidden) // 4, np.inf, "<f4").tobytes()


@pytest.mark.parametrize("damaged", [1, 100])
def test_hidden_states_that_are_not_finite_are_computed_again_once(damaged: int) -> None:
    model = DamagedModel(SETTINGS.kv_blocks, damaged=damaged)
    run = Simulation(Scheduler(SETTINGS, 1, 1), FakeStages(model, [linear(200, 10)]))
    request = embedding(0, tuple(range(50)))
    key = run.add(request)
    run.finish()
    assert run.scheduler.counts.retries == 1 and run.scheduler.queues.memory.blocks.held == 0
    if damaged == 1:
        check(run, key, request)
    else:
        assert run.updates[key] == [Failed("hidden states of tokens [0, 20) are not finite numbers")]


@pytest.mark.parametrize("n_bytes", [0, 13, 4 * WIDTH * 9, 2 * 4 * WIDTH * 10])
def test_a_result_with_other_bytes_than_rows_is_refused(n_bytes: int) -> None:
    run = Simulation(Scheduler(SETTINGS, 1, 2), stages(SETTINGS.kv_blocks))
    run.add(embedding(0, tuple(range(10))))
    run.send_all()
    with pytest.raises(ProtocolError, match=f"{n_bytes} bytes instead of 10 hidden states of 16 bytes"):
        run.scheduler.complete(Result(1, 0, embeddings=bytes(n_bytes)), 1)
