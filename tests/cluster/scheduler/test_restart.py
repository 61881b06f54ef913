"""Tests of a scheduler that restarts on other stages at any moment: tokens and scores stay the same."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.core.errors import ProtocolError
from llamaclust.core.sampler.params import SamplerChain, SamplingParams
from support.clusters.fakes import VOCABULARY, ConstantModel, FakeModel, FakeStages, Simulation, expected, linear
from support.seed import SEED

SETTINGS = SchedulerSettings(
    "m", VOCABULARY, context_length=200, kv_blocks=40, max_sequences=6, max_waiting=64, prefill_chunk=24
)


def stages(source: Random, kv_blocks: int) -> FakeStages:
    """Draws one to three stages with empty memory."""
    return FakeStages(FakeModel(kv_blocks), [linear(source.randrange(50, 500), 10)] * source.randrange(1, 4))


def request(source: Random, number: int) -> GenerationRequest:
    prompt = tuple(source.randrange(VOCABULARY) for _ in range(source.randrange(1, 90)))
    tokens = source.choice((0, 5, 40))
    params = source.choice((SamplingParams(), SamplingParams(chain=SamplerChain(mirostat=2))))
    score_from = source.choice((None, 1)) if tokens else 1
    return GenerationRequest(f"r{number}", prompt, tokens, params, seed=number, score_from=score_from)


@pytest.mark.parametrize("number", range(12))
def test_restarts_at_any_moment_change_nothing(number: int) -> None:
    print(f"seed {SEED}, {number}")
    source = Random(f"{SEED} {number}")
    first = stages(source, SETTINGS.kv_blocks)
    run = Simulation(Scheduler(SETTINGS, 1, len(first.stage_ns)), first)
    generations = [request(source, i) for i in range(20)]
    keys = [run.add(generation) for generation in generations]
    epoch = 1
    for _ in range(source.randrange(2, 12)):
        for _ in range(source.randrange(12)):
            run.step()
        run.send_all()
        epoch += 1
        kv_blocks = source.randrange(14, 60)
        run.stages = stages(source, kv_blocks)
        run.sent.clear()
        run.scheduler.restart(replace(SETTINGS, kv_blocks=kv_blocks), epoch, len(run.stages.stage_ns))
        assert run.scheduler.counts.in_flight == run.scheduler.counts.running == 0
    run.finish()
    for key, generation in zip(keys, generations, strict=True):
        rows, scores, _ = expected(generation, SETTINGS.context_length)
        assert run.rows(key) == rows
        assert run.scores(key) == scores
    assert run.scheduler.queues.memory.blocks.held == 0


def test_those_that_were_first_are_first_again() -> None:
    source = Random(SEED)
    run = Simulation(Scheduler(SETTINGS, 1, 1), stages(source, SETTINGS.kv_blocks))
    keys = [run.add(replace(request(source, i), max_new_tokens=30, prompt=(1,) * 40)) for i in range(12)]
    for _ in range(10):
        run.step()
    run.send_all()
    run.scheduler.restart(SETTINGS, 2, 1)
    assert [sequence.key for sequence in run.scheduler.queues.waiting] == [
        key for key in keys if key in run.scheduler._sequences
    ]


def test_an_answer_of_an_older_epoch_is_refused() -> None:
    source = Random(SEED)
    run = Simulation(Scheduler(SETTINGS, 1, 1), stages(source, SETTINGS.kv_blocks))
    run.add(replace(request(source, 0), max_new_tokens=5))
    run.send_all()
    _, late = run.sent.popleft()
    run.scheduler.restart(SETTINGS, 2, 1)
    run.stages = stages(source, SETTINGS.kv_blocks)
    run.send_all()
    with pytest.raises(ProtocolError, match=r"of epoch 0\.1, but microbatch 0 of epoch 0\.2 is due"):
        run.scheduler.complete(late, run.now_ns)


def test_a_new_request_does_not_wait_for_all_that_is_computed_again() -> None:
    """Streams with little left to compute do not wait either, and the oldest one is computed as well."""
    settings = SchedulerSettings("m", VOCABULARY, context_length=2048, kv_blocks=2048, max_sequences=64)

    def stage() -> FakeStages:
        return FakeStages(ConstantModel(settings.kv_blocks), [linear(3000, 400)])

    run = Simulation(Scheduler(settings, 1, 1), stage())
    lengths = [600, *[400] * 8, *[100] * 8]
    keys = [run.add(GenerationRequest(f"r{i}", (i,) * length, 50, seed=i)) for i, length in enumerate(lengths)]
    while min(len(run.updates[key]) for key in keys) < 2:
        run.step()
    run.send_all()
    run.sent.clear()
    run.scheduler.restart(settings, 2, 1)
    lost_ns = run.now_ns
    run.stages = stage()
    had = {key: len(run.updates[key]) for key in keys}
    new = [run.add(GenerationRequest(f"new {i}", (99 - i,) * length, 2)) for i, length in enumerate((5, 2, 2, 2, 2))]
    resumed_ns: dict[int, int] = {}
    while len(resumed_ns) < len(keys) + len(new):
        run.step()
        for key in (*keys, *new):
            if len(run.updates[key]) > had.get(key, 0):
                resumed_ns.setdefault(key, run.now_ns - lost_ns)
    in_ms = {key: ns / 1e6 for key, ns in resumed_ns.items()}
    all_ms = max(in_ms.values())
    assert max(in_ms[key] for key in new) < 150
    assert max(in_ms[key] for key in keys[9:]) < 0.75 * all_ms
    assert in_ms[keys[0]] < 0.75 * all_ms, "half of the rows are the oldest one's"
