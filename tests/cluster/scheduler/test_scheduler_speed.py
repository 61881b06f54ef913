"""Tests how the scheduler uses stage times, on a simulated clock."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from llamaclust.cluster.scheduler.microbatching import cycle_ns
from llamaclust.cluster.scheduler.requests import GenerationRequest
from llamaclust.cluster.scheduler.rows.chunking import chunk_rows
from llamaclust.cluster.scheduler.rows.slice import ScheduledMicrobatch
from llamaclust.cluster.scheduler.scheduler import Scheduler
from llamaclust.cluster.scheduler.settings import SchedulerSettings
from llamaclust.cluster.scheduler.stage_times import Curve, StageTimes
from llamaclust.wire.microbatch.messages import Result, StageTiming
from support.clusters.fakes import VOCABULARY, ConstantModel, FakeStages, Simulation, StageNs, linear

SETTINGS = SchedulerSettings("m", VOCABULARY, context_length=1024, kv_blocks=2048, prefix_cache=False)


def simulated(stage_ns: list[StageNs], hop_us: float = 100, beside: float = 1.0) -> Simulation:
    fake = FakeStages(ConstantModel(SETTINGS.kv_blocks), stage_ns, round(hop_us * 1000), beside)
    return Simulation(Scheduler(SETTINGS, 1, len(stage_ns)), fake)


def generation(index: int, length: int, max_new_tokens: int) -> GenerationRequest:
    return GenerationRequest("r", tuple((index + i) % VOCABULARY for i in range(length)), max_new_tokens)


def prefill_ms(run: Simulation, requests: int, tokens: int) -> float:
    start = run.now_ns
    for index in range(requests):
        run.add(generation(index, tokens, 1))
    run.finish()
    return (run.now_ns - start) / 1e6


def decode_ms(run: Simulation, sequences: int, tokens: int = 200, skipped: int = 80) -> float:
    """Returns the mean time per token of each sequence, after the first ones."""
    keys = [run.add(generation(index, 10, tokens)) for index in range(sequences)]
    while min(len(run.rows(key)) for key in keys) < skipped:
        assert run.step()
    start, before = run.now_ns, sum(len(run.rows(key)) for key in keys)
    while all(len(run.rows(key)) < tokens for key in keys):
        assert run.step()
    done = sum(len(run.rows(key)) for key in keys) - before
    return (run.now_ns - start) / 1e6 / (done / sequences)


def test_prefill_keeps_two_stages_busy() -> None:
    whole, half = linear(3000, 200), linear(1500, 100)
    for _ in range(2):  # without learned times, then with those of the first round
        one, two = simulated([whole]), simulated([half, half])
        ratios = [prefill_ms(two, 8, 512) / prefill_ms(one, 8, 512) for _ in range(2)]
        assert ratios[0] <= 0.60 and ratios[1] <= 0.56


def test_a_single_prompt_is_chunked_so_that_stages_overlap() -> None:
    one, two = simulated([linear(3000, 200)]), simulated([linear(1500, 100)] * 2)
    for run in (one, two):
        prefill_ms(run, 4, 512)
    assert prefill_ms(two, 1, 512) <= 0.70 * prefill_ms(one, 1, 512)


@pytest.mark.parametrize(("fixed_us", "row_us"), [(1000, 10), (1000, 120), (1000, 1000), (50, 5)])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("sequences", [2, 8, 13, 32])
def test_decode_reaches_the_bound_of_the_stage_times(
    fixed_us: float, row_us: float, stages: int, sequences: int
) -> None:
    stage_ns = linear(fixed_us / stages, row_us / stages)
    run = simulated([stage_ns] * stages)
    hops = (stages + 1) * run.stages.hop_ns
    groups = range(1, min(run.scheduler.times.in_flight, sequences) + 1)
    bounds = [cycle_ns([stage_ns(-(-sequences // n))] * stages, n, hops) / 1e6 for n in groups]
    reached = decode_ms(run, sequences)
    assert reached <= min(bounds) / 0.9
    assert reached <= bounds[0] * 1.02, "splitting must not cost anything"


@pytest.mark.parametrize("beside", [1.0, 1.3, 1.6, 2.0])
def test_stages_that_slow_each_other_down_are_not_overlapped(beside: float) -> None:
    alone = decode_ms(simulated([linear(500, 60)] * 2, beside=1.0), 1) * (500 + 60 * 8) / 560
    run = simulated([linear(500, 60)] * 2, beside=beside)
    reached = decode_ms(run, 8, tokens=700, skipped=300)
    assert reached <= alone * 1.05
    overlapped = sum(len(scheduled.microbatch.chunks) < 8 for scheduled in run.microbatches[-200:])
    assert (overlapped > 100) == (beside < 1.5)


def test_requests_that_come_apart_come_together_again() -> None:
    run = simulated([linear(1000, 10)])
    for index in range(8):
        run.add(generation(index, 10 + index, 200))
        for _ in range(3):
            run.step()
    for _ in range(20 + run.scheduler.lookahead.most_steps):
        run.step()
    assert all(len(scheduled.microbatch.chunks) == 8 for scheduled in run.microbatches[-5:])


def test_never_more_in_flight_than_keeps_stages_busy() -> None:
    for stages in (1, 2, 4):
        run = simulated([linear(1000, 100)] * stages)
        for index in range(10):
            run.add(generation(index, 500, 30))
        while run.step():
            run.send_all()
            assert len(run.sent) <= max(2 * stages, run.scheduler.lookahead.most_steps) + 1
            if any(sequence.remaining > 600 for sequence in run.scheduler.sequences):
                assert len(run.sent) >= stages


def test_a_stage_is_idle_only_for_links_while_there_is_prefill() -> None:
    run = simulated([linear(1000, 100), linear(1200, 120), linear(800, 80)])
    spent = prefill_ms(run, 30, 500)
    assert max(run.stages.busy_ns) / 1e6 / spent >= 0.95


def test_prefill_chunks_take_400_ms_without_decode() -> None:
    run = simulated([linear(5000, 2000)])
    prefill_ms(run, 5, 512)
    rows = [scheduled.microbatch.rows for scheduled in run.microbatches[3:-2]]
    assert all(160 <= count <= 208 for count in rows), rows
    faster = simulated([linear(1000, 20)])
    prefill_ms(faster, 30, 512)
    assert faster.microbatches[-10].microbatch.rows == SETTINGS.max_batch_tokens


def test_the_last_chunks_are_small_where_later_stages_wait_for_them() -> None:
    times = {stages: StageTimes(stages) for stages in (1, 2)}
    for stages, count in itertools.product((1, 2), (16, 64, 128, 256)):
        timings = (StageTiming(0, 1_000_000 + 100_000 * count, 0, count),) * stages
        times[stages].learn(Result(1, 0, timings=timings), False, False, 1)
    rows = {
        stages: [chunk_rows(SETTINGS, times[stages], 4000, left, 0, alone=False) for left in (4000, 200, 64)]
        for stages in (1, 2)
    }
    assert rows[2] == sorted(rows[2], reverse=True) and rows[2][1] == 96 and rows[2][2] == 32
    assert len(set(rows[1])) == 1


def test_chunks_are_larger_without_decode() -> None:
    times = StageTimes(1)
    for rows in (16, 64, 128):
        times.learn(Result(1, 0, timings=(StageTiming(0, 1_000_000 + 1_000_000 * rows, 0, rows),)), False, False, 1)
    decoding, alone = (chunk_rows(SETTINGS, times, 4000, 4000, 0, alone=alone) for alone in (False, True))
    assert decoding == 96 and alone == 384


def test_chunks_without_decode_are_no_smaller_on_slow_stages() -> None:
    times = StageTimes(1)
    for rows in (16, 64, 128):
        ns = 20_000_000 * (20 + rows)
        times.learn(Result(1, 0, timings=(StageTiming(0, ns, 0, rows),)), False, False, 1)
    assert chunk_rows(SETTINGS, times, 4000, 4000, 0, alone=True) == 64
    assert chunk_rows(SETTINGS, times, 4000, 4000, 0, alone=False) == 16


def test_one_slow_microbatch_does_not_change_the_chunks() -> None:
    times = StageTimes(1)

    def learn(rows: int, ns: int) -> None:
        times.learn(Result(1, 0, timings=(StageTiming(0, ns, 0, rows),)), False, False, ns)

    for rows in itertools.chain(*[(64, 128, 256)] * 10):
        learn(rows, 1_000_000 + 100_000 * rows)
    before = chunk_rows(SETTINGS, times, 4000, 4000, 0, alone=False)
    learn(256, 300_000_000)
    assert chunk_rows(SETTINGS, times, 4000, 4000, 0, alone=False) >= before / 2


def test_waiting_behind_others_is_not_taken_for_the_links() -> None:
    times = StageTimes(2)
    timings = (StageTiming(0, 1_000_000, 0, 8), StageTiming(0, 1_000_000, 0, 8))
    times.learn(Result(1, 0, timings=timings), True, True, 2_300_000)
    assert times.transit_ns == 300_000 and times.in_flight == 3
    times.learn(Result(1, 1, timings=timings), True, False, 9_000_000)
    assert times.transit_ns == 300_000 and times.in_flight == 3


def test_fixed_chunks_and_limits_of_rows() -> None:
    times = StageTimes(2)
    assert chunk_rows(replace(SETTINGS, prefill_chunk=7), times, 1000, 1000, 3, alone=False) == 7
    assert (
        chunk_rows(replace(SETTINGS, prefill_chunk=8192), times, 1000, 1000, 3, alone=False)
        == SETTINGS.max_batch_tokens - 3
    )
    assert chunk_rows(SETTINGS, times, 1000, 1000, SETTINGS.max_batch_tokens - 10, alone=False) == 10


@pytest.mark.parametrize("seed", range(10))
def test_curves_learn_lines_and_steps(seed: int) -> None:
    random_ = random.Random(seed)
    fixed, row = random_.choice([0, 100, 10_000]), random_.choice([1, 50, 1000])
    curve = Curve()
    assert curve.predict(5) is None
    for _ in range(300):
        rows = random_.choice([1, 2, 4, 8, 32, 100, 512])
        curve.learn(rows, fixed + row * rows)
    for rows in (1, 3, 8, 20, 64, 300, 512, 1000):
        predicted = curve.predict(rows)
        assert predicted == pytest.approx(fixed + row * rows, rel=0.05), rows


def test_prompts_beside_another_pipeline_are_computed_in_short_chunks_one_at_a_time() -> None:
    """The other pipeline's decode waits for each chunk at every stage, and may not wait for long."""
    run, rows = simulated([linear(10, 1)] * 3), list[int]()

    def check(scheduled: ScheduledMicrobatch) -> None:
        counts = [len(taken.chunk.tokens) for taken in run.scheduler.in_flight.slices()]
        rows.append(sum(count for count in counts if count > 1))

    run.check = check
    run.scheduler.is_shared = True
    keys = [run.add(generation(index, 150, 4)) for index in range(3)]
    run.finish()
    assert 16 < max(rows) <= 32
    assert all(len(run.rows(key)) == 4 for key in keys)
