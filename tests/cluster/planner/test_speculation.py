"""Compares gains of speculation that plans predict with the scheduler's choice and with a simulated pipeline."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from llamaclust.cluster.planner.format import plan_json, plan_lines
from llamaclust.cluster.planner.links import COORDINATOR, Links
from llamaclust.cluster.planner.plan import Plan, Prediction, Round
from llamaclust.cluster.planner.planner import make_plan
from llamaclust.cluster.planner.speculation import SpeculationGain, predict_gain
from llamaclust.cluster.scheduler.drafting.drafter import Draft, Drafter, Drafters
from llamaclust.cluster.scheduler.speculation.candidates import MAX_WINDOW, Candidate
from llamaclust.cluster.scheduler.speculation.costs import MeasuredRounds
from llamaclust.cluster.scheduler.speculation.settings import SpeculationSettings
from llamaclust.cluster.scheduler.speculation.windows import best_windows
from llamaclust.cluster.scheduler.stage_times import StageTimes
from llamaclust.core.sizes import MIB
from llamaclust.model.costs import LayerCost, ModelCosts
from llamaclust.wire.microbatch.messages import Result, StageTiming
from support.clusters.fakes import VOCABULARY, Simulation
from support.plans.plan_inputs import LAYER, REQUEST, SMALL, link, profile, split_by_hand, step_time, worker
from support.plans.simulations import generation, simulation
from support.seed import SEED

GB = 10**9
MODEL = ModelCosts(GB, GB, 10**9, (LayerCost(GB // 10, 10**8, 1024),) * 10)
WINDOWED = replace(SMALL, layers=(LAYER, replace(LAYER, window=1000, window_bytes_per_token=4096)) * 6)
STATEFUL = replace(SMALL, layers=(replace(LAYER, state_bytes=MIB),) * 12)
SHARES = tuple(step / 50 for step in range(51))


def gain_of(plan: Plan, acceptance: float) -> SpeculationGain:
    gain = None if plan.prediction is None else predict_gain(plan.prediction, acceptance)
    assert gain is not None
    return gain


def measured_plan(source: random.Random) -> Plan:
    """Plans two measured workers and links, where each further row takes a stage the same time."""
    stage_ms, layers_ms, head_ms = source.uniform(0.1, 1.0), source.uniform(10, 50), source.uniform(0.1, 5.0)
    row = [source.choice([0.0, 0.02, 0.1, 0.5]) * value for value in (stage_ms, layers_ms, head_ms)]
    steps = tuple(
        step_time(rows, stage_ms + rows * row[0], layers_ms + rows * row[1], head_ms + rows * row[2])
        for rows in (1, 8, 128)
    )
    hop_ms = source.choice([0.0, 0.2, 20.0])
    pairs = [frozenset(pair) for pair in (("a", "b"), ("a", COORDINATOR), ("b", COORDINATOR))]
    split = split_by_hand(("a", 0, 4), ("b", 4, 10))
    request = replace(REQUEST, manual=split, links=Links({pair: link(hop_ms) for pair in pairs}))
    workers = [replace(worker(name), profile=profile(isolated=steps, concurrent=steps)) for name in "ab"]
    return make_plan(MODEL, workers, request)


def without_chains(plan: Plan) -> Plan:
    """Returns the plan with rounds like those of one stage, where windows do not overlap."""
    assert plan.prediction is not None
    rounds = tuple(replace(each, slowest_s=each.seconds) for each in plan.prediction.rounds)
    return replace(plan, prediction=replace(plan.prediction, rounds=rounds))


def test_gains_begin_at_one_and_grow_with_acceptance() -> None:
    source = random.Random(SEED)
    plans = [measured_plan(source) for _ in range(20)]
    plans += [make_plan(SMALL, [worker("a", read=source.uniform(5, 80), int8=300)], REQUEST) for _ in range(5)]
    for plan in plans:
        gains = [gain_of(plan, share) for share in SHARES]
        assert (gains[0].gain, gains[0].drafted_tokens) == (1.0, 0)
        assert plan.prediction is not None
        assert gains[0].tokens_per_s == pytest.approx(1 / plan.prediction.token_s)
        assert all(less.gain <= more.gain for less, more in pairwise(gains))
        assert all(gain.tokens_per_s == pytest.approx(gain.gain * gains[0].tokens_per_s) for gain in gains)
    assert max(gain_of(plan, 1.0).gain for plan in plans) > 4


def test_windows_are_those_with_most_tokens_a_second() -> None:
    source = random.Random(SEED)
    for _ in range(20):
        chained, acceptance = measured_plan(source), source.uniform(0.1, 0.99)
        plan = without_chains(chained)
        prediction, found = plan.prediction, gain_of(plan, acceptance)
        assert prediction is not None
        gains = {
            each.drafted: (1 - acceptance ** (each.drafted + 1)) / (1 - acceptance) * prediction.token_s / each.seconds
            for each in prediction.rounds
        }
        assert gain_of(chained, acceptance).gain >= found.gain
        if max(gains.values()) < 1.0:
            assert (found.drafted_tokens, found.gain) == (0, 1.0)
        elif max(gains.values()) > 1.1:
            assert found.gain == pytest.approx(max(gains.values()))
            assert gains[found.drafted_tokens] == pytest.approx(found.gain)


def test_the_scheduler_chooses_the_same_window_from_the_same_times() -> None:
    source, chosen = random.Random(SEED), set[int]()
    for _ in range(30):
        plan = without_chains(measured_plan(source))
        prediction = plan.prediction
        assert prediction is not None
        times = StageTimes(1)
        transit_s = 1.5 * prediction.links_s  # three hops through the coordinator instead of two between stages
        seconds = {1: sum(stage.decode_s for stage in prediction.stages)}
        seconds |= {1 + each.drafted: each.seconds - transit_s for each in prediction.rounds}
        for rows in (1, 2, 3, 5, 9, 17, 33):
            timing = StageTiming(0, round(1e9 * seconds[rows]), 0, rows)
            times.learn(Result(1, rows, (), (timing,)), True, True, timing.compute_ns)
        times.transit_ns, times.whole_transit_ns = 1e9 * prediction.links_s, 1e9 * transit_s
        for acceptance in (0.0, 0.3, 0.5, 0.8, 0.95, 1.0):
            candidate = Candidate((0,) * MAX_WINDOW, acceptance)
            (window,) = best_windows([candidate], MeasuredRounds(times), 1, MAX_WINDOW)
            assert window == gain_of(plan, acceptance).drafted_tokens
            chosen.add(window)
    assert len(chosen) > 4


def test_a_round_reads_weights_once_and_has_products_and_an_output_row_for_each_token() -> None:
    """Products take longer than reading from 8 rows on in layers, from 11 on in the head."""
    plan = make_plan(SMALL, [worker("a")], REQUEST)
    assert plan.prediction is not None
    links_s = 2 * Links().between("a", COORDINATOR).one_way_s
    for each in plan.prediction.rounds:
        rows = 1 + each.drafted
        layer_s = 10 * MIB / 20e9 if rows < 8 else rows * 20e6 / 300e9
        head_s = 20 * MIB / 20e9 if rows < 11 else rows * 30e6 / 300e9
        assert each.seconds == pytest.approx(12 * layer_s + head_s + links_s)
    assert [each.drafted for each in plan.prediction.rounds][-1] == MAX_WINDOW


def test_rounds_cross_links_with_all_rows_and_return_to_the_coordinator() -> None:
    links = Links({frozenset("ab"): link(2.0, 1.0), frozenset(("b", COORDINATOR)): link(5.0)})
    request = replace(REQUEST, manual=split_by_hand(("a", 0, 6), ("b", 6, 12)), links=links)
    plan = make_plan(replace(SMALL, hidden_bytes=100_000), [worker("a"), worker("b")], request)
    assert plan.prediction is not None
    first = plan.prediction.rounds[0]
    decode_s = sum(stage.decode_s for stage in plan.prediction.stages)
    there_s = links.between("a", COORDINATOR).one_way_s + 2e-3 + 5e-3
    assert first.drafted == 1 and first.seconds == pytest.approx(decode_s + 2 * 0.1e-3 + there_s)


def test_windows_of_layers_bound_drafts_and_states_have_no_prediction() -> None:
    request = replace(REQUEST, context_length=8192)
    fast = worker("a", memory_mib=None, int8=30_000)
    assert gain_of(make_plan(SMALL, [fast], request), 1.0).drafted_tokens == MAX_WINDOW
    assert gain_of(make_plan(SMALL, [fast], replace(request, max_window=5)), 1.0).drafted_tokens == 5
    plan = make_plan(WINDOWED, [fast], request)
    assert plan.window_blocks and gain_of(plan, 1.0).drafted_tokens == 16
    off, stateful = make_plan(SMALL, [fast], replace(request, max_window=0)), make_plan(STATEFUL, [fast], request)
    unmeasured = make_plan(SMALL, [worker("a", read=None)], request)
    assert all(plan_json(other)["speculation"] is None for other in (off, stateful, unmeasured))
    shown = [[line for line in plan_lines(other) if "speculation" in line] for other in (off, stateful, unmeasured)]
    assert shown == [[], ["  speculation: not predicted for layers with states"], []]
    assert all(other.prediction is not None for other in (off, stateful))


def test_texts_say_gain_speed_and_drafts() -> None:
    rounds = tuple(Round(drafted, 0.1 + 0.02 * drafted, 0.1 + 0.02 * drafted) for drafted in (1, 2, 3, 4))
    plan = replace(make_plan(SMALL, [worker("a")], REQUEST), prediction=Prediction((), 0.1, 0, 0, 0, "a", rounds))
    plan = replace(plan, stages=())
    lines = plan_lines(plan, (0.1, 0.9, 1.0))
    (shown,) = (line for line in lines if "speculation" in line)
    assert shown == (
        "  speculation: no gain with 10 % of drafted tokens right, 2.3x with 90 % (23 tok/s, drafts of 4), "
        "2.8x with 100 % (28 tok/s, drafts of 4)"
    )
    (gain,) = plan_json(plan, (1.0,))["speculation"]
    assert gain == {
        "acceptance": 1.0,
        "drafted_tokens": 4,
        "gain": pytest.approx(5 / 1.8),
        "tokens_per_s": pytest.approx(50 / 1.8),
    }


FIXED_US, LENGTH = 1000.0, 2000


class ReplayedDrafters:
    """Drafters of a known text, each token of which is right with this probability."""

    def __init__(self, text: Sequence[int], right: float, source: random.Random) -> None:
        self._text, self._right, self._source = text, right, source

    def of(self, key: Hashable) -> Drafter:
        return self

    def ended(self, key: Hashable, tokens: Sequence[int]) -> None:
        pass

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        following = self._text[len(tokens) : len(tokens) + most]
        wrong = (self._source.random() >= self._right for _ in following)
        return Draft(tuple((token + add) % VOCABULARY for token, add in zip(following, wrong, strict=True)), 0)


def simulated(row_us: float, hop_us: float, stages: int, drafters: Drafters | None) -> tuple[float, list[int]]:
    """Returns (tokens a second, the answer) of one request on simulated stages."""
    speculation = None if drafters is None else SpeculationSettings(drafters)
    run: Simulation = simulation(
        stages,
        FIXED_US,
        row_us,
        hop_us,
        speculation=speculation,
        context_length=LENGTH + 16,
        kv_blocks=130,
        max_outputs=64,
    )
    key = run.add(generation(8, LENGTH))
    run.step()
    begun_ns = run.now_ns
    run.finish()
    return (LENGTH - 1) / (run.now_ns - begun_ns) * 1e9, [row.token for row in run.rows(key)]


@pytest.mark.parametrize(
    ("row_us", "hop_us", "stages", "acceptance"),
    [(20, 5, 1, 0.9), (100, 50, 2, 0.8), (5, 4000, 2, 0.6), (200, 1000, 3, 0.9), (900, 5, 1, 0.3)],
)
def test_a_simulated_pipeline_gains_what_is_predicted(
    row_us: float, hop_us: float, stages: int, acceptance: float
) -> None:
    """The tolerance is for chance, and for the time in which the scheduler learns the acceptance."""
    plain, answer = simulated(row_us, hop_us, stages, None)
    text = [*generation(8, LENGTH).prompt, *answer]
    drafters = ReplayedDrafters(text, acceptance, random.Random(SEED))
    drafted, again = simulated(row_us, hop_us, stages, drafters)
    assert again == answer

    def computed_s(rows: int) -> float:
        return stages * (FIXED_US + row_us * rows) / 1e6

    links_s = hop_us * (stages if stages > 1 else 0) / 1e6
    rounds = tuple(
        Round(window, computed_s(1 + window) + (stages + 1) * hop_us / 1e6, computed_s(1 + window) / stages)
        for window in (*range(1, 9), 12, 16, 24, 32)
    )
    prediction = Prediction((), computed_s(1) + links_s, links_s, 0, 0, "a", rounds)
    found = predict_gain(prediction, acceptance)
    assert found is not None
    predicted = found.gain
    assert 0.7 * predicted < drafted / plain < 1.25 * predicted, (drafted / plain, predicted)
