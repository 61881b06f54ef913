"""Tests a pipeline whose KV memory holds no full-length sequence: longer sequences wait, and others go on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llamaclust.core.errors import ContextLengthError
from support.clusters.fakes import FakeModel, FakeStages, Simulation, linear
from support.plans.simulations import BASE, check_answer, generation, simulation

REQUESTS = [generation(100, 90), generation(150, 40), generation(20, 30), generation(40, 50)]
"""Requests whose sequences have 190, 190, 50 and 90 tokens."""
SHORT_BLOCKS = 8  # Blocks for 128 tokens.


def on_other_workers(run: Simulation, kv_blocks: int, epoch: int) -> Simulation:
    """Continues after a loss, on workers with this number of KV blocks."""
    run.scheduler.restart(replace(BASE, kv_blocks=kv_blocks), epoch, 2)
    stages = FakeStages(FakeModel(kv_blocks), [linear(100, 10)] * 2, 1000)
    return Simulation(run.scheduler, stages, updates=run.updates)


@pytest.mark.parametrize("steps", [0, 3, 40])
def test_sequences_that_are_too_long_wait_until_memory_is_back_and_get_the_same_answers(steps: int) -> None:
    run = simulation()
    keys = [run.add(request) for request in REQUESTS]
    for _ in range(steps):
        run.step()
    run = on_other_workers(run, SHORT_BLOCKS, 2)
    while run.step():
        pass
    waiting = {sequence.key for sequence in run.scheduler.sequences}
    assert waiting == {keys[0], keys[1]} == {sequence.key for sequence in run.scheduler.queues.too_long}
    assert run.scheduler.counts.waiting == 2 and run.scheduler.counts.kv_blocks_held == 0
    late = run.add(generation(30, 20))
    while run.step():
        pass
    check_answer(run, late, generation(30, 20))
    run = on_other_workers(run, BASE.kv_blocks, 3)
    run.finish()
    for key, request in zip(keys, REQUESTS, strict=True):
        check_answer(run, key, request)


def test_a_sequence_that_outgrows_memory_alone_waits_and_can_be_cancelled() -> None:
    run = simulation()
    key = run.add(generation(100, 90))
    run.step()
    run = on_other_workers(run, SHORT_BLOCKS, 2)
    while run.step():
        pass
    (sequence,) = run.scheduler.queues.too_long
    assert len(sequence.tokens) > 16 * SHORT_BLOCKS > sequence.prompt_length
    assert run.scheduler.abort(key) is sequence and not run.scheduler.queues.too_long
    run.finish()


def test_new_requests_are_measured_by_the_memory_that_is_left() -> None:
    run = on_other_workers(simulation(), SHORT_BLOCKS, 2)
    with pytest.raises(ContextLengthError, match="has 150 tokens, but this model's maximum context length is 128"):
        run.add(generation(150, 10))


def test_sequences_move_with_a_lane_whether_they_fit_or_not() -> None:
    run = simulation()
    keys = [run.add(request) for request in REQUESTS]
    short, old = replace(BASE, kv_blocks=SHORT_BLOCKS), run.scheduler
    successor = old.successor(short, 2, 2)
    successor.take_over(old, old.sequences)
    assert not old.sequences and [each.key for each in successor.queues.too_long] == [keys[1]]
    third = successor.successor(BASE, 3, 2)
    third.take_over(successor, successor.movable)
    again = Simulation(third, FakeStages(FakeModel(BASE.kv_blocks), [linear(100, 10)] * 2, 1000), updates=run.updates)
    again.finish()
    for key, request in zip(keys, REQUESTS, strict=True):
        check_answer(again, key, request)
