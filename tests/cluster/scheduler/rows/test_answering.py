"""Tests of the times of requests whose first results are logprobs of the prompt, and of restored requests."""

from __future__ import annotations

import pytest

from llamaclust.cluster.scheduler.requests import Finished, GenerationRequest, Timings
from support.clusters.fakes import Simulation, expected
from support.plans.simulations import check_answer, generation, simulation

LENGTH, TOKENS = 150, 20


def timings_of(run: Simulation, key: int) -> Timings:
    last = run.updates[key][-1]
    assert isinstance(last, Finished)
    return last.timings


def sampled_ms(run: Simulation, request: GenerationRequest) -> tuple[int, list[float]]:
    """Runs the request to its end, and returns its key and the times of its sampled tokens."""
    key, times_ms = run.add(request), list[float]()
    while run.step():
        times_ms += [run.now_ns / 1e6] * (len(run.rows(key)) - len(times_ms))
    return key, times_ms


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("score_from", [None, 0, 100])
def test_first_tokens_come_after_the_logprobs_of_the_prompt(score_from: int | None, stages: int) -> None:
    run, request = simulation(stages), generation(LENGTH, TOKENS, score_from=score_from)
    arrived_ms = run.now_ns / 1e6
    key, times_ms = sampled_ms(run, request)
    check_answer(run, key, request)
    timings, first_ms = timings_of(run, key), times_ms[0] - arrived_ms
    assert timings.ttft_ms == pytest.approx(first_ms)
    assert timings.prefill_tok_s == pytest.approx(1e3 * LENGTH / first_ms)
    assert timings.decode_tok_s == pytest.approx(1e3 * (TOKENS - 1) / (times_ms[-1] - times_ms[0]))


@pytest.mark.parametrize("restored", [0, 1, 10, TOKENS - 1])
def test_restored_tokens_do_not_count_in_the_speed_of_the_answer(restored: int) -> None:
    rows, _, _ = expected(generation(LENGTH, TOKENS), 200)
    run = simulation()
    key, times_ms = sampled_ms(run, generation(LENGTH, TOKENS, answered=tuple(rows[:restored])))
    assert run.rows(key) == rows[restored:]
    timings, new = timings_of(run, key), TOKENS - restored
    assert timings.generated_tokens == TOKENS
    assert timings.decode_tok_s == pytest.approx(1e3 * (new - 1) / max(1e-9, times_ms[-1] - times_ms[0]))


def test_a_prompt_without_an_answer_is_computed_until_its_last_result() -> None:
    run, request = simulation(), generation(LENGTH, 0, score_from=0)
    arrived_ms = run.now_ns / 1e6
    key, _ = sampled_ms(run, request)
    check_answer(run, key, request)
    assert timings_of(run, key).prefill_tok_s == pytest.approx(1e3 * LENGTH / (run.now_ns / 1e6 - arrived_ms))
